"""Round-to-nearest with searched scales, for groups of 4-bit integers.

What is least is the sum of squared errors of a group, as decoded: scales rounded to float16. Of
every scale that is tried, two (symmetric: one) more follow by least squares: codes stay and the
scale (and zero) that fits them best takes its place, to which codes are then rounded anew.

Symmetric: the weight of largest magnitude meets a code from 7 to 9.5 or from -7.5 to -10 (beyond 7
and -8 it is cut), half a code apart; the first one tried is 7, which cuts nothing. Asymmetric: the
range of a group meets 14 to 19 steps about its middle, of which 15 cuts nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.sparse.format import Bytes, Floats

CHUNK = 1 << 16  # weights that are searched at once: temporaries stay in cache
LEVELS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, -7.5, -8.0, -8.5, -9.0, -9.5, -10.0)
STEPS = (15.0, 14.0, 16.0, 17.0, 18.0, 19.0)

Zeros = NDArray[np.int8]


def search(
    x: Floats,
    asymmetric: bool,
    levels: tuple[float, ...] = (),
    fits: int = 2,
    positive: bool = False,
) -> tuple[Floats, Zeros, Bytes]:
    """Scales, zeros and codes of groups of weights.

    Args:
        x: float32 [n, group].
        asymmetric: whether groups have a zero point.
        levels: the codes (or steps) that are tried; those above if there are none.
        fits: how many scales by least squares follow each (symmetric: at most one).
        positive: no scale is negative (symmetric; a negative level is none then).

    Returns:
        d float32 [n] (float16 numbers), z int8 [n] in eighths of a step, codes uint8 [n, group].
    """
    n, group = x.shape
    d, z = np.empty(n, np.float32), np.zeros(n, np.int8)
    codes = np.empty((n, group), np.uint8)
    step = max(1, CHUNK // group)
    for at in range(0, n, step):
        some = slice(at, at + step)
        columns = np.ascontiguousarray(x[some].T)  # sums run in order
        if asymmetric:
            d[some], z[some], found = _asymmetric(columns, levels or STEPS, fits)
        else:
            d[some], found = _symmetric(columns, levels or LEVELS, min(fits, 1), positive)
        codes[some] = found.T
    return d, z, codes


def _half(d: Floats) -> Floats:
    return d.astype(np.float16).astype(np.float32)


def _inverse(d: Floats) -> Floats:
    return np.where(d == 0, np.float32(0), 1 / d)


@np.errstate(all="ignore")
def _symmetric(
    x: Floats, levels: tuple[float, ...], fits: int, positive: bool
) -> tuple[Floats, Floats]:
    at = np.abs(x).argmax(axis=0)[None]
    most = np.take_along_axis(x, at, axis=0)[0]
    if positive:
        most, levels = np.abs(most), tuple(level for level in levels if level > 0)
    best = np.full(x.shape[1], np.inf, np.float32)
    scale = np.zeros_like(best)
    for level in levels:
        d = _half(most / np.float32(level))
        for fit in range(fits + 1):
            codes = np.rint(x * _inverse(d)).clip(-8, 7)
            error = ((codes * d - x) ** 2).sum(axis=0)
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, d, scale)
            if fit < fits:
                d = _half((codes * x).sum(axis=0) / (codes * codes).sum(axis=0))
    return scale, np.rint(x * _inverse(scale)).clip(-8, 7) + 8


@np.errstate(all="ignore")
def _asymmetric(x: Floats, steps: tuple[float, ...], fits: int) -> tuple[Floats, Zeros, Floats]:
    least, most = x.min(axis=0), x.max(axis=0)
    # Wide enough for a zero that z can say: z = -128 is 8 steps below code 0, as far as it goes.
    widest = np.maximum(least, -most) / 8
    best = np.full(x.shape[1], np.inf, np.float32)
    scale, zero = np.zeros_like(best), np.zeros_like(best)
    n, sum_x = np.float32(len(x)), x.sum(axis=0)
    for step in steps:
        d = (most - least) / np.float32(step)
        low = np.where(d < widest, least, (least + most) / 2 - d * np.float32(7.5))
        d = np.maximum(d, widest)
        for fit in range(fits + 1):
            d = _half(d)
            z = np.rint(-8 * (low * _inverse(d) + 8)).clip(-128, 127)
            codes = _codes(x, d, z)
            error = (((codes - (8 + z / 8)) * d - x) ** 2).sum(axis=0)
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, d, scale)
            zero = np.where(better, z, zero)
            if fit < fits:
                sum_c, sum_cx = codes.sum(axis=0), (codes * x).sum(axis=0)
                d = n * (codes * codes).sum(axis=0) - sum_c * sum_c
                d = (n * sum_cx - sum_c * sum_x) / d
                low = (sum_x - d * sum_c) / n
    return scale, zero.astype(np.int8), _codes(x, scale, zero)


def _codes(x: Floats, d: Floats, z: Floats) -> Floats:
    codes: Floats = np.rint(x * _inverse(d) + (8 + z / 8)).clip(0, 15)
    return codes
