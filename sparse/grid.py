"""The grid of a weight format: which weights a group of them can have, so that others may round.

In each group a weight is `scale * level + offset`, its code being the level's index. A format that
says so gets searched scales and GPTQ (`headrace.sparse.gptq`), which are written once over this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from headrace.sparse.format import Bytes, Floats

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The levels of a format and the three functions that know where its bytes are.

    Args:
        group: weights that share a scale; the format's block is a multiple of it.
        levels: in rising order, at most 256.
        fit: weights float32 [rows, n] and the importance of each input, float32 [n] or None ->
            raw bytes whose scales suit them; their codes are of no account.
        scales: raw bytes -> scale and offset (or None) of every group, float32 [rows, n / group],
            as `Format.decode` uses them.
        put: raw bytes, codes uint8 [rows, n] -> the raw bytes with these codes.
    """

    group: int
    levels: tuple[float, ...]
    fit: Callable[[Floats, Floats | None], Bytes]
    scales: Callable[[Bytes], tuple[Floats, Floats | None]]
    put: Callable[[Bytes, Bytes], Bytes]

    @cached_property
    def table(self) -> Floats:
        """The levels as float32."""
        return np.array(self.levels, np.float32)

    @cached_property
    def nearest(self) -> Callable[[Floats], Bytes]:
        """Gives the codes, uint8, of the levels that are nearest to float32 values."""
        return nearest(self.levels)

    def round(self, x: Floats, raw: Bytes) -> Bytes:
        """The raw bytes with the codes that are nearest to the weights: float32 [rows, n]."""
        rows, n = x.shape
        scale, offset = self.scales(raw)
        groups = x.reshape(rows, n // self.group, self.group)
        if offset is not None:
            groups = groups - offset[..., None]
        return self.put(raw, self.nearest(groups * inverse(scale)[..., None]).reshape(rows, n))


def inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 for 0 and what is as small as numbers can be."""
    with np.errstate(divide="ignore", over="ignore"):
        found: Floats = np.where(np.abs(scale) < _TINY, np.float32(0), 1 / scale)
    return found


def nearest(levels: Sequence[float]) -> Callable[[Floats], Bytes]:
    """A function from float32 values to the indices, uint8, of the nearest levels."""
    table = np.array(levels, np.float32)
    low, high = table[0], table[-1]
    if (np.diff(table) == 1).all():

        def whole(x: Floats) -> Bytes:
            y = np.rint(x)
            np.clip(y, low, high, out=y)
            y -= low
            return y.astype(np.uint8)

        return whole
    between = (table[1:] + table[:-1]) / 2
    return lambda x: np.searchsorted(between, x).astype(np.uint8)
