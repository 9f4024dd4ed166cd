"""Measure the machine: how fast all threads together read memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    load_u8,
    part,
    store_u8,
)
from headrace.targets.table import Case, Kernel
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def read(args: Any, thread: Any, n_threads: Any) -> None:
    """Read a buffer once. Slots: 0 buffer, 1 blocks of 512 bytes, 2 out (64 bytes a thread).

    The exclusive or of each thread's share goes to `out`, so that no load can be left away.
    """
    buffer = arg_ptr(args, 0)
    n = arg_int(args, 1)
    acc = load_u8(buffer, 8, 64) ^ load_u8(buffer, 8, 64)
    for i in range(n * thread // n_threads, n * (thread + 1) // n_threads):
        acc = acc ^ load_u8(buffer + i * 512, 8, 64)
    x = part(acc, 0) ^ part(acc, 1) ^ part(acc, 2) ^ part(acc, 3)
    y = part(acc, 4) ^ part(acc, 5) ^ part(acc, 6) ^ part(acc, 7)
    store_u8(arg_ptr(args, 2) + thread * 64, x ^ y)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    data = rng.integers(0, 256, (6, 8, 64), dtype=np.uint8)
    out = np.zeros((8, 64), np.uint8)
    expected = np.bitwise_xor.reduce(data.reshape(-1, 64))

    def folds(found: np.ndarray, expected: np.ndarray) -> bool:
        """However many threads share the blocks, together they give the same."""
        return bool((np.bitwise_xor.reduce(found) == expected).all())

    yield Case([data, 6, out], [(out, expected)], folds, "6 blocks")


def kernel() -> Kernel:
    """The row "probe_read"."""
    return Kernel("probe_read", lambda target: read, (__name__,), _cases, __name__)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [kernel()]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
