"""Scales and zero points for the weights of `headrace.sparse.n_bits`, with rounding over them.

What is least is the sum of squared errors of a group. Its range meets 15 steps, or a few more or
fewer; of each, some fits by least squares follow: codes stay, the scale that fits them best takes
its place, and codes are rounded anew. A symmetric group has zero at code 8.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from headrace.sparse.format import Bytes, Floats, byte_blocks, pack_nibbles, weight_blocks
from headrace.sparse.grid import Grid, inverse
from headrace.sparse.int4_zeros import FITS, STEPS
from headrace.sparse.n_bits import HEAD, parts_of, raw_blocks

LEVELS = tuple(float(code) for code in range(16))
MIDDLE = 8


def search(
    x: Floats, importance: Floats | None, group: int, symmetric: bool
) -> tuple[Bytes, Floats]:
    """Zero points uint8 and scales float32 [rows, n / group] of weights [rows, n].

    Args:
        x: the weights.
        importance: of each input, float32 [n]; None: all the same.
        group: weights of a group.
        symmetric: zero is code 8.
    """
    groups = weight_blocks(x, group)
    weights: Floats = np.ones(groups.shape[1:], np.float32)
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32).reshape(-1, group)
    least, most = groups.min(-1).clip(None, 0), groups.max(-1).clip(0)
    best = np.full(groups.shape[:2], np.inf, np.float32)
    scale, zero = np.zeros_like(best), np.full_like(best, MIDDLE)
    for step in STEPS:
        if symmetric:  # the largest lies at code 0, which is 8 steps away
            d, z = np.where(-least >= most, -least, -most) * np.float32(1.875 / step), zero
        else:
            d = (most - least) / np.float32(step)
            middle = (most + least) / 2
            z = np.rint(np.float32(7.5) - middle * inverse(d)).clip(0, 15)
        for fit in range(FITS + 1):
            steps = np.rint(groups * inverse(d)[..., None] + z[..., None]).clip(0, 15)
            steps -= z[..., None]
            error = (weights * np.square(steps * d[..., None] - groups)).sum(-1)
            better = error < best
            best = np.where(better, error, best)
            scale, zero = np.where(better, d, scale), np.where(better, z, zero)
            if fit < FITS:
                weighted = weights * steps
                d = (weighted * groups).sum(-1) * inverse((weighted * steps).sum(-1))
    return zero.astype(np.uint8), scale


@cache
def grid(group: int, symmetric: bool) -> Grid:
    """For GPTQ and rounding to nearest, over raw blocks of `headrace.sparse.n_bits`."""
    block_bytes = HEAD + group // 2

    def fit(x: Floats, importance: Floats | None) -> Bytes:
        return raw_blocks(np.zeros(x.shape, np.uint8), *search(x, importance, group, symmetric))

    def scales(raw: Bytes) -> tuple[Floats, Floats | None]:
        _, zeros, d = parts_of(raw, group)
        return d, -d * zeros

    def put(raw: Bytes, codes: Bytes) -> Bytes:
        found = raw.copy()
        blocks = byte_blocks(found, block_bytes)
        packed = pack_nibbles(codes.reshape(len(raw), -1, 32))
        blocks[..., HEAD:] = packed.reshape(blocks[..., HEAD:].shape)
        return found

    return Grid(group=group, levels=LEVELS, fit=fit, scales=scales, put=put)
