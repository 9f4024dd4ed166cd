"""Scales, and offsets, with which the levels of a grid are nearest to groups of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from headrace.sparse.format import Bytes, Floats
from headrace.sparse.grid import inverse, nearest

_SEARCH = 1 << 15  # weights that are searched at once: temporaries stay in the cache
# The largest weight is tried at so many times the outermost level: beyond 1, it is cut. From one
# power of two to the next, for scales that are such.
_FACTORS = tuple(np.float32(1 + 0.05 * i) for i in range(-5, 9))
# With few levels more of the weights are beyond the outermost one.
_FEW_LEVELS = 8
_FAR_FACTORS = tuple(np.float32(1.5 + 0.1 * i) for i in range(16))
_RANGES = tuple(np.float32(1 - 0.03 * i) for i in range(-1, 10))


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
    factors = _FACTORS + (_FAR_FACTORS if len(table) <= _FEW_LEVELS else ())
    for level in (end * factor for factor in factors for end in ends):
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
