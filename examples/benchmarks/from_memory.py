"""Kernels timed from memory: copies of one matrix that no cache holds, one behind the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.kernels import execute
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.sparse import linear, plane_tables
from headrace.sparse.registry import FORMATS
from headrace.sparse.unpacking import unpacking_slots
from headrace.targets.table import ENTRY
from headrace.team import Team

ROTATED = 256 << 20


class Side:
    """A kernel over copies of one matrix.

    Args:
        raw: the matrix; its copies fill `ROTATED` bytes on huge pages.
        slots: gives the kernel's slots, for the address of a copy.
    """

    def __init__(
        self, name: str, address: int, raw: np.ndarray, slots: Callable[[int], list[Any]]
    ) -> None:
        self.name, self.n_bytes = name, raw.nbytes
        self.copies = -(-ROTATED // raw.nbytes)
        self._arena = Arena({str(i): raw.nbytes for i in range(self.copies)})
        self._kept = []
        self.steps = np.zeros((self.copies, execute.STEP_SLOTS), np.int64)
        for i in range(self.copies):
            self._arena.view(str(i))[: raw.nbytes] = raw.reshape(-1)
            at = self._arena.address(str(i))
            arrays = slots(at)
            block = argument_block(arrays)
            self._kept += [*arrays, block]
            self.steps[i, :3] = address, block.ctypes.data, execute.STEP_BARRIER
            self.steps[i - 1, 3:5] = at, raw.nbytes  # what comes after the one before
        self._times: list[np.ndarray] = []

    def run(self, team: Team) -> None:
        """One pass; keeps the times of all matrices."""
        ticks = np.zeros(self.copies + 1, np.int64)
        start = time.perf_counter()
        team.run(self.steps, ticks=ticks)
        second = (ticks[-1] - ticks[0]) / (time.perf_counter() - start)
        self._times.append(np.diff(ticks) / second)

    @property
    def best(self) -> float:
        """Seconds that the fastest tenth of all matrices took at most."""
        return float(np.quantile(np.concatenate(self._times), 0.1))

    @property
    def passes(self) -> np.ndarray:
        """Seconds of a matrix in each pass, of which the fastest quarter counts."""
        return np.quantile(np.stack(self._times), 0.25, axis=1)

    def speed_beside(self, other: Side) -> float:
        """Bytes per second over those of another that takes turns with this; median of passes.

        What else the machine does moves both of a pass, so this says more than the best of each.
        """
        return float(np.median(other.passes / self.passes)) * self.n_bytes / other.n_bytes

    def imbalance(self, shares: int) -> float:
        """The longest share of a matrix over the mean, each timed alone on one core."""
        times = np.empty((self.copies, shares))
        for n, (address, block) in enumerate(self.steps[:, :2]):
            entry = ENTRY(int(address))
            for i in range(shares):
                start = time.perf_counter()
                entry(int(block), i, shares)
                times[n, i] = time.perf_counter() - start
        each = np.quantile(times, 0.1, axis=0)
        return float(each.max() / each.mean())


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy where the runtime would have it: at a cache line."""
    arena = Arena({"x": x.nbytes})
    arena.view("x")[: x.nbytes] = x.reshape(-1).view(np.uint8)
    _arenas.append(arena)
    return arena.view("x")[: x.nbytes].reshape(x.shape)


_arenas: list[Arena] = []


def dense(
    name: str, operation: str, address: int, w: np.ndarray, x: np.ndarray, y: np.ndarray
) -> Side:
    """A format's product of one token ("gemv" or "gemv2") with the whole of `w`.

    A tile of it is coded; the others repeat its bytes, which no kernel can tell.
    """
    fmt = FORMATS[name]
    quantize = linear.quantize_q8x2 if operation == "gemv2" else linear.quantize_q8
    if fmt.activation == "tables":
        quantize = plane_tables.code_tables
    coded, one, bias = aligned(quantize(x, 1)), np.ones(1, np.int64), np.zeros(len(w), np.float32)
    tiles, blocks = len(w) // 16, w.shape[1] // fmt.block
    raw = np.repeat(fmt.tile(fmt.encode(w[:16])), tiles, axis=0)
    unpacking = unpacking_slots(fmt, w.shape[1], 1)

    def slots(at: int) -> list[Any]:
        return [
            at, coded, y, blocks, tiles, one, 0, y.strides[0], bias, coded[0].nbytes, *unpacking
        ]  # fmt: skip

    return Side(f"{name} {operation}", address, raw, slots)


def reading(address: int, n_threads: int) -> Side:
    """The kernel "probe_read" over 32 MB at a time: what memory gives at most."""
    out = np.zeros(n_threads * 64 + 64, np.uint8)
    raw = np.ones(32 << 20, np.uint8)
    return Side("read", address, raw, lambda at: [at, raw.nbytes // 512, out])
