"""Call one kernel from Python, on one thread."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.targets.table import ENTRY


def argument_block(slots: list[Any]) -> np.ndarray:
    """8 bytes a slot: an array's address, a float as float32, or an integer."""
    block = np.zeros(len(slots), np.int64)
    floats = block.view(np.float32)
    for i, value in enumerate(slots):
        if isinstance(value, np.ndarray):
            block[i] = value.ctypes.data
        elif isinstance(value, float):
            floats[2 * i] = value  # the low half of the slot on little-endian machines
        else:
            block[i] = value
    return block


def invoke(address: int, slots: list[Any], thread: int = 0, n_threads: int = 1) -> None:
    """Run one thread's share of a kernel; arrays in `slots` must stay alive meanwhile."""
    block = argument_block(slots)
    ENTRY(address)(block.ctypes.data, thread, n_threads)
