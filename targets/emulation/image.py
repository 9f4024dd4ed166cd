"""What goes to an emulated program and comes back: argument blocks and arrays in one piece.

Layout (little-endian 64-bit words): number of places, number of calls; the places, which are
offsets of words that hold an offset and shall hold its address; of each call the offset of its
argument block, its thread and the number of threads; argument blocks; arrays, each at a multiple
of 64 bytes with guard bytes on both sides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.errors import KernelError

ALIGNMENT = 64
GUARD_BYTES = 256
GUARD = 0xFF  # NaN as a float of any width: what reads beyond an array shows as well

Launch = tuple[list[Any], int]  # slots as in `headrace.targets.table.Case`, number of threads


def _root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _round_up(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


class Image:
    """The image of some calls of one kernel, which its threads make one after the other."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._arrays: dict[int, tuple[np.ndarray, int]] = {}  # by id: the array, its offset
        places, calls = [], []
        n_places = sum(isinstance(slot, np.ndarray) for slots, _ in launches for slot in slots)
        n_calls = sum(n_threads for _, n_threads in launches)
        end = _round_up(8 * (2 + n_places + 3 * n_calls))
        blocks: list[tuple[int, np.ndarray]] = []
        for slots, n_threads in launches:
            block = np.zeros(len(slots), np.int64)
            blocks.append((end, block))
            calls += [(end, thread, n_threads) for thread in range(n_threads)]
            at, end = end, _round_up(end + block.nbytes)
            for i, slot in enumerate(slots):
                if isinstance(slot, np.ndarray):
                    offset, end = self._offset(slot, end)
                    block[i] = offset
                    places.append(at + 8 * i)
                elif isinstance(slot, float):
                    block[i : i + 1].view(np.float32)[0] = slot
                else:
                    block[i] = slot
        image = np.full(end, GUARD, np.uint8)
        header = [len(places), len(calls), *places, *(word for call in calls for word in call)]
        image[: 8 * len(header)] = np.array(header, np.int64).view(np.uint8)
        for at, block in blocks:
            image[at : at + block.nbytes] = block.view(np.uint8)
        for array, at in self._arrays.values():
            image[at : at + array.nbytes] = np.frombuffer(self._bytes(array), np.uint8)
        self.data = image.tobytes()

    def _offset(self, array: np.ndarray, end: int) -> tuple[int, int]:
        """Offset of an array, and the end of the image with it."""
        root = _root(array)
        if id(root) not in self._arrays:
            if not (root.flags.c_contiguous or root.flags.f_contiguous):
                raise ValueError("an argument of a kernel must be in one piece")
            start = _round_up(end + GUARD_BYTES)
            self._arrays[id(root)] = root, start
            end = _round_up(start + root.nbytes + GUARD_BYTES)
        return self._arrays[id(root)][1] + array.ctypes.data - root.ctypes.data, end

    @staticmethod
    def _bytes(array: np.ndarray) -> bytes:
        return ctypes.string_at(array.ctypes.data, array.nbytes)

    def restore(self, data: bytes) -> None:
        """Give the arrays the content that came back.

        Raises:
            KernelError: bytes beside an array changed.
        """
        if len(data) != len(self.data):
            raise KernelError(f"{len(data)} bytes came back instead of {len(self.data)}")
        before, after = (np.frombuffer(one, np.uint8) for one in (self.data, data))
        for array, at in self._arrays.values():
            for start, stop in ((at - GUARD_BYTES, at), (at + array.nbytes, None)):
                stop = start + GUARD_BYTES if stop is None else stop
                wrong = np.flatnonzero(after[start:stop] != GUARD)
                if len(wrong):
                    where = start + int(wrong[0]) - at
                    raise KernelError(
                        f"store outside of an array of shape {array.shape} ({array.nbytes} bytes): "
                        f"at byte {where}"
                    )
            if array.flags.writeable:
                ctypes.memmove(array.ctypes.data, data[at : at + array.nbytes], array.nbytes)
            elif (after[at : at + array.nbytes] != before[at : at + array.nbytes]).any():
                raise KernelError(f"store to a constant array of shape {array.shape}")
