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

_SEARCH = 1 << 15  # weights that are searched at once: temporaries stay in the cache
# Of the outermost level, where the largest weight is tried; 1 is where ranges end exactly.
_FACTORS = tuple(np.float32(1 - 0.035 * i) for i in range(-2, 9))
_RANGES = tuple(np.float32(1 - 0.03 * i) for i in range(-1, 10))


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
    """1 / scale, and 0 for 0."""
    with np.errstate(divide="ignore"):
        found: Floats = np.where(scale == 0, np.float32(0), 1 / scale)
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


def half(x: Floats) -> Floats:
    """The nearest float16 values, as float32."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def search_groups(
    x: Floats,
    importance: Floats | None,
    group: int,
    levels: Sequence[float],
    allowed: Callable[[Floats], Floats] = half,
) -> Floats:
    """The scale of each group whose nearest levels are off least, in squares.

    The largest weight is tried on, within and beyond both outermost levels; for the codes of each
    try the best scale follows by least squares.

    Args:
        x: float32 [rows, n].
        importance: of each input, float32 [n]; None: all the same.
        allowed: the nearest scales that the format has.

    Returns:
        float32 [rows, n / group].
    """
    table, to_codes = np.array(levels, np.float32), nearest(levels)

    def search(some: Floats, weights: Floats | None) -> tuple[Floats]:
        return (_scale(some, weights, table, to_codes, allowed),)

    return _by_runs(search, x, importance, group)[0]


def _by_runs(
    search: Callable[[Floats, Floats | None], tuple[Floats, ...]],
    x: Floats, importance: Floats | None, group: int,
) -> list[Floats]:  # fmt: skip
    """What `search` finds for groups [k, group], some rows at a time: float32 [rows, n / group]."""
    rows, n = x.shape
    step = max(1, _SEARCH // n)
    found = []
    for at in range(0, rows, step):
        some = x[at : at + step].reshape(-1, group)
        weights = None
        if importance is not None:
            weights = np.tile(importance.reshape(-1, group), (len(some) * group // n, 1))
        found.append(search(some, weights))
    shape = rows, n // group
    return [np.concatenate(parts).reshape(shape) for parts in zip(*found, strict=True)]


def _scale(
    x: Floats, weights: Floats | None, table: Floats, to_codes: Callable[[Floats], Bytes],
    allowed: Callable[[Floats], Floats],
) -> Floats:  # fmt: skip
    peak = x[np.arange(len(x)), np.abs(x).argmax(axis=1)]
    weighted = x if weights is None else x * weights
    total = np.einsum("ij,ij->i", weighted, x)
    best, scale = total.copy(), np.zeros(len(x), np.float32)
    # The sign matters where one end is farther from 0 than the other.
    ends = {abs(float(end)): end for end in (table[0], table[-1])}.values()
    for level in (end * factor for factor in _FACTORS for end in ends):
        step = allowed(peak / level)
        q = table[to_codes(x * inverse(step)[:, None])]
        ql = q if weights is None else q * weights
        xq, qq = np.einsum("ij,ij->i", ql, x), np.einsum("ij,ij->i", ql, q)
        for s in (step, allowed(xq * inverse(qq))):  # as it is, and by least squares
            error = total - s * (2 * xq - s * qq)
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, s, scale)
    return scale


def search_affine_groups(
    x: Floats, importance: Floats | None, group: int, steps: int
) -> tuple[Floats, Floats]:
    """The scale and the offset of each group of `scale * code + offset`, code 0..steps.

    Tries about the range from the smallest weight to the largest, each mended by least squares;
    both are float16 values. Arguments and results are as in `search_groups`.
    """

    def search(some: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
        w = np.broadcast_to(np.float32(1), some.shape) if weights is None else weights
        return _affine(some, w, steps)

    scale, offset = _by_runs(search, x, importance, group)
    return scale, offset


def _affine(x: Floats, w: Floats, steps: int) -> tuple[Floats, Floats]:
    low, high = x.min(axis=1), x.max(axis=1)
    middle = ((low + high) / 2)[:, None]  # sums of what lies around 0 lose less
    y, sum_w = x - middle, np.einsum("ij->i", w)
    wy = w * y
    sum_y = np.einsum("ij->i", wy)
    scale, offset = half((high - low) / steps), half(low)
    best = _affine_error(x, w, scale, offset, steps)
    for factor in _RANGES:
        step = (high - low) * factor / steps
        start = (low + high - step * steps) / 2
        codes = np.rint((x - start[:, None]) * inverse(step)[:, None])
        np.clip(codes, 0, steps, out=codes)
        wc = w * codes
        sum_c = np.einsum("ij->i", wc)
        sum_cc, sum_cy = np.einsum("ij,ij->i", wc, codes), np.einsum("ij,ij->i", wc, y)
        det = sum_w * sum_cc - sum_c * sum_c
        found = (sum_w * sum_cy - sum_c * sum_y) * inverse(det)
        shift = (sum_y - found * sum_c) * inverse(sum_w) + middle[:, 0]
        found, shift = half(found), half(shift)
        error = _affine_error(x, w, found, shift, steps)
        better = (det > 0) & (error < best)
        best = np.where(better, error, best)
        scale, offset = np.where(better, found, scale), np.where(better, shift, offset)
    return scale, offset


def _affine_error(x: Floats, w: Floats, scale: Floats, offset: Floats, steps: int) -> Floats:
    codes = np.rint((x - offset[:, None]) * inverse(scale)[:, None])
    np.clip(codes, 0, steps, out=codes)
    codes *= scale[:, None]
    codes += offset[:, None]
    codes -= x
    found: Floats = np.einsum("ij,ij,ij->i", codes, codes, w)
    return found
