"""Compare what a kernel gave with what its case expects."""

from __future__ import annotations

import numpy as np

from headrace.errors import KernelError
from headrace.targets.table import Case


class WrongResultError(KernelError):
    """A kernel's result is not what its reference says; the message shows the worst cell."""


def _same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    """NaN is NaN: IEEE 754 leaves open which one an operation gives."""
    if found.tobytes() == expected.tobytes():
        return True
    if found.dtype.kind in "iub" or found.shape != expected.shape:
        return False
    both = np.isnan(found) & np.isnan(expected)
    return np.where(both, 0, found).tobytes() == np.where(both, 0, expected).tobytes()


def check(case: Case) -> None:
    """Compare every output of a case with what is expected.

    Raises:
        WrongResultError: an output differs by more than the case allows.
    """
    for found, expected in case.expected:
        if callable(case.tolerance):
            if not case.tolerance(found, expected):
                raise WrongResultError(f"{case.label}: values differ")
            continue
        if case.exact:
            if not _same_bits(found, expected.astype(found.dtype)):
                raise WrongResultError(f"{case.label}: not equal bit for bit")
            continue
        tolerance = np.broadcast_to(np.asarray(case.tolerance, np.float64), found.shape)
        error = np.abs(found.astype(np.float64) - expected)
        bad = ~(error <= tolerance)
        if bad.any():
            worst = np.unravel_index(np.nanargmax(np.where(bad, error, -1)), found.shape)
            raise WrongResultError(
                f"{case.label}: {bad.sum()} of {bad.size} cells; worst {worst}: found "
                f"{found[worst]}, expected {expected[worst]}, tolerance {tolerance[worst]}"
            )
