"""The search of scales and zero points of groups of 4-bit integers (`i4a` of `sparse.int4`).

What is least is the sum of squared errors of a group, as decoded: scales rounded to float16, zeros
to eighths of a step. The range of a group meets 14 to 19 steps about its middle, of which 15 cuts
nothing and is the first; of each, two scales and zeros more follow by least squares: codes stay,
what fits them best takes its place, and codes are rounded anew.
"""

from __future__ import annotations

import numpy as np

from headrace.sparse.format import Floats
from headrace.sparse.grid import inverse
from headrace.sparse.scale_search import half

CHUNK = 1 << 16  # weights that are searched at once: temporaries stay in cache
STEPS = (15.0, 14.0, 16.0, 17.0, 18.0, 19.0)
FITS = 2


def search_zeros(
    x: Floats,
    importance: Floats | None,
    group: int,
    steps: tuple[float, ...] = STEPS,
    fits: int = FITS,
) -> tuple[Floats, Floats]:
    """Scales and zeros of the groups of some rows.

    Args:
        x: the weights, float32 [rows, n].
        importance: of each input, float32 [n]; None: all the same.
        group: weights of a group.
        steps: the numbers of steps that are tried.
        fits: how many fits by least squares follow each.

    Returns:
        d, float16 numbers, and z, whole eighths of a step in -128..127: float32 [rows, n / group].
    """
    rows, n = x.shape
    d, z = np.empty((rows, n // group), np.float32), np.empty((rows, n // group), np.float32)
    some = max(1, CHUNK // n)
    for at in range(0, rows, some):
        part = slice(at, min(at + some, rows))
        columns = np.ascontiguousarray(x[part].reshape(-1, group).T)  # sums run in order
        weights = np.ones_like(columns)
        if importance is not None:
            weights = np.tile(importance.reshape(-1, group).T, (1, part.stop - at))
        found = _search(columns, weights, steps, fits)
        d[part], z[part] = (one.reshape(-1, n // group) for one in found)
    return d, z


@np.errstate(all="ignore")
def _search(
    x: Floats, weights: Floats, steps: tuple[float, ...], fits: int
) -> tuple[Floats, Floats]:
    least, most = x.min(axis=0), x.max(axis=0)
    # Wide enough for a zero that z can say: z = -128 is 8 steps below code 0, as far as it goes.
    widest = np.maximum(least, -most) / 8
    best = np.full(x.shape[1], np.inf, np.float32)
    scale, zero = np.zeros_like(best), np.zeros_like(best)
    sum_w, sum_x = weights.sum(axis=0), (weights * x).sum(axis=0)
    for step in steps:
        d = (most - least) / np.float32(step)
        low = np.where(d < widest, least, (least + most) / 2 - d * np.float32(7.5))
        d = np.maximum(d, widest)
        for fit in range(fits + 1):
            d = half(d)
            z = np.rint(-8 * (low * inverse(d) + 8)).clip(-128, 127)
            codes = np.rint(x * inverse(d) + (8 + z / 8)).clip(0, 15)
            error = (weights * ((codes - (8 + z / 8)) * d - x) ** 2).sum(axis=0)
            better = error < best
            best, scale = np.where(better, error, best), np.where(better, d, scale)
            zero = np.where(better, z, zero)
            if fit < fits:
                weighted = weights * codes
                sum_c, sum_cx = weighted.sum(axis=0), (weighted * x).sum(axis=0)
                det = sum_w * (weighted * codes).sum(axis=0) - sum_c * sum_c
                d = (sum_w * sum_cx - sum_c * sum_x) / det
                low = (sum_x - d * sum_c) / sum_w
    return scale, zero
