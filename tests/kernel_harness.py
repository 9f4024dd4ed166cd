"""Run a kernel's cases in this process, on real threads, and compare with its reference."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from headrace.kernels.invoke import ENTRY, argument_block
from headrace.targets.table import Case


def call(address: int, slots: list[Any], n_threads: int) -> None:
    """Call a kernel once per thread, all at the same time."""
    block, entry = argument_block(slots), ENTRY(address)
    if n_threads == 1:
        entry(block.ctypes.data, 0, 1)
        return
    threads = [
        threading.Thread(target=entry, args=(block.ctypes.data, i, n_threads))
        for i in range(n_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def check(case: Case) -> None:
    """Compare every output with what is expected; the message shows the worst cell."""
    for found, expected in case.expected:
        if callable(case.tolerance):
            assert case.tolerance(found, expected), f"{case.label}: values differ"
            continue
        if isinstance(case.tolerance, int) and case.tolerance == 0:
            assert found.tobytes() == expected.astype(found.dtype).tobytes(), case.label
            continue
        tolerance = np.broadcast_to(np.asarray(case.tolerance, np.float64), found.shape)
        error = np.abs(found.astype(np.float64) - expected)
        bad = ~(error <= tolerance)
        if bad.any():
            worst = np.unravel_index(np.nanargmax(np.where(bad, error, -1)), found.shape)
            raise AssertionError(
                f"{case.label}: {bad.sum()} of {bad.size} cells; worst {worst}: found "
                f"{found[worst]}, expected {expected[worst]}, tolerance {tolerance[worst]}"
            )
