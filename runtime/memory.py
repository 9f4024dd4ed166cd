"""Zeroed memory outside Python's heap: one mapping, given back to the system as a whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from headrace.errors import BudgetError
from headrace.sizes import format_size

ALIGNMENT = 64


def _round_up(n: int, to: int = ALIGNMENT) -> int:
    return -(-n // to) * to


def _map(n_bytes: int) -> mmap.mmap:
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            # Python's default is shared memory, for which the system gives no huge pages.
            return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return mmap.mmap(-1, n_bytes)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise BudgetError(
            f"the system refuses {format_size(n_bytes)} of memory in one piece: end other programs,"
            " raise the limit of this process (`ulimit -v`, vm.overcommit_memory), or take a "
            "shorter context or a smaller model",
            needed_bytes=n_bytes,
        ) from error


def give_back_heap() -> None:
    """Give free parts of the C library's heap back to the system, as far as that lets us."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def offsets_of(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where pieces of these sizes begin when they lie behind each other, aligned; all bytes."""
    offsets = {}
    total = 0
    for name, size in sizes.items():
        offsets[name] = total
        total += _round_up(size)
    return offsets, total


def aligned_slots(n: int) -> np.ndarray:
    """Zeroed slots of 8 bytes that begin with a cache line: int64 [n]."""
    raw = np.zeros(n + ALIGNMENT // 8, np.int64)
    skip = -raw.ctypes.data % ALIGNMENT // 8
    return raw[skip : skip + n]


class Arena:
    """Named, aligned pieces of one anonymous mapping, on huge pages where the system has them.

    Pages are zero and take memory only when touched. The mapping goes when neither the arena nor
    one of its views is referenced any more; addresses do not keep it.

    Raises:
        BudgetError: the system does not give that much address space.
    """

    def __init__(self, sizes: dict[str, int], *, huge: bool = True) -> None:
        offsets, total = offsets_of(sizes)
        self.n_bytes = total
        self._sizes = dict(sizes)
        self._offsets = offsets
        self._map = _map(max(total, 1))
        if huge:
            self._ask_for_huge_pages()
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.base = self._bytes.ctypes.data

    def _ask_for_huge_pages(self) -> None:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def change_to_huge_pages(self) -> None:
        """Drop the content, and take huge pages for what comes, where the system has them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._ask_for_huge_pages()

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def __iter__(self) -> Iterator[str]:
        return iter(self._offsets)

    def address(self, name: str) -> int:
        """Where a piece begins."""
        return self.base + self._offsets[name]

    def release(self, name: str, start: int, n_bytes: int) -> None:
        """Give whole pages of a piece back to the system; what was in them is lost."""
        at = self._offsets[name] + start
        page = mmap.PAGESIZE
        first, last = _round_up(at, page), (at + n_bytes) // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            # Else the system, looking for huge pages to make, would fill the hole again by itself.
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_NOHUGEPAGE, first, last - first)
            # A huge page of which a part is dropped is otherwise kept whole, and counted in the
            # container, until memory is short: this splits it first.
            if hasattr(mmap, "MADV_FREE"):
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_FREE, first, last - first)
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def empty(self) -> None:
        """Give all its pages back to the system: what is not referenced any more only by and by."""
        for name, size in self._sizes.items():
            self.release(name, 0, size)

    def view(self, name: str, dtype: str = "u1") -> np.ndarray:
        """A piece as an array, which keeps the whole mapping."""
        start = self._offsets[name]
        return self._bytes[start : start + self._sizes[name]].view(dtype)
