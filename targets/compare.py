"""Compare what a kernel gave with what its case expects."""

from __future__ import annotations

import numpy as np

from headrace.errors import KernelError
from headrace.targets.table import Case


class WrongResultError(KernelError):
    """A kernel's result is not what its reference says; the message shows the worst cell."""


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
            if found.tobytes() != expected.astype(found.dtype).tobytes():
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
