"""Zeroed memory outside Python's heap: one mapping, given back to the system as a whole."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import numpy as np

ALIGNMENT = 64


def _round_up(n: int, to: int = ALIGNMENT) -> int:
    return -(-n // to) * to


class Arena:
    """Named, aligned pieces of one anonymous mapping, on huge pages where the system has them.

    Pages are zero and take memory only when touched.
    """

    def __init__(self, sizes: dict[str, int], *, huge: bool = True) -> None:
        offsets = {}
        total = 0
        for name, size in sizes.items():
            offsets[name] = total
            total += _round_up(size)
        self.n_bytes = total
        self._sizes = dict(sizes)
        self._offsets = offsets
        if hasattr(mmap, "MAP_PRIVATE"):
            # Python's default is shared memory, for which the system gives no huge pages.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._map = mmap.mmap(-1, max(total, 1), flags=flags)
        else:
            self._map = mmap.mmap(-1, max(total, 1))
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.base = self._bytes.ctypes.data

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def __iter__(self) -> Iterator[str]:
        return iter(self._offsets)

    def address(self, name: str) -> int:
        """Where a piece begins."""
        return self.base + self._offsets[name]

    def view(self, name: str, dtype: str = "u1") -> np.ndarray:
        """A piece as an array; it must not outlive the arena's `close`."""
        start = self._offsets[name]
        return self._bytes[start : start + self._sizes[name]].view(dtype)
