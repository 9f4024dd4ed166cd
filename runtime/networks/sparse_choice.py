"""Which weights are sparse enough, and for which kernel: a model of cost, all in one place.

Costs are in dense products of 16 weights by one pixel's input, as the dense kernel does them. What
an entry costs, and turning 16 x 16 values, was measured on AVX-512 (Sapphire Rapids, one thread, in
whole networks: EfficientNet-Lite0 and MobileNetV1, 49 to 12544 pixels, 16 to 1152 channels). On
other CPUs vectors are shorter for both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from headrace.kernels.sparse_product import PANEL, ROWS, entries_of, kept_blocks
from headrace.sparse.format import TILE_ROWS

LEAST_PIXELS = 16  # below, the memory binds, and vectors are half empty
LEAST_ZEROS = 0.1  # share of weights, or it is not worth a look
GAIN = 1.1  # times as fast as dense, or it stays dense
_TURN = 80.0  # of 16 x 16 values
# Of an entry, for each panel of pixels and each vector of them, by rows of a block; where blocks
# are whole tiles, for each pixel (Zen 4, one thread, 49 to 12544 pixels, 32 to 1024 channels).
_ENTRY = {1: (2.0, 1.6), 4: (1.5, 3.6)}
_ENTRY_OF_TILE = 1.04
# Of bytes: four inputs of 4 outputs, and a tile, of a vector of 16 rows. Measured as above, with
# VNNI for both sides (170 and 205 billion multiply-adds a second); dense products in matrix
# registers take the last share of that (590 billion with AMX).
_FOUR, _TILE, _IN_MATRICES = 19.0, 375.0, 0.35
# An image that the second cache does not hold is written in pieces of many pixels by sparse
# products, of a few by dense ones: that costs these so much more for 16 values.
_CACHED_BYTES, _FAR = 1 << 20, 6.0


@dataclass(frozen=True)
class Kept:
    """What is there of a matrix of weights.

    Attributes:
        weights: those that are not zero.
        blocks: those of each kind that have any, in each tile of 16 outputs, by rows of a block;
            none: it is too full.
    """

    weights: int
    blocks: dict[int, tuple[int, ...]]


def kept_of(w: np.ndarray) -> Kept:
    """Of weights [outputs, channels read]."""
    weights = int(np.count_nonzero(w))
    if weights > (1 - LEAST_ZEROS) * w.size:
        return Kept(weights, {})
    kept = {rows: entries_of(kept_blocks(w, rows), rows).sum(axis=(1, 2)) for rows in ROWS}
    return Kept(weights, {rows: tuple(found.tolist()) for rows, found in kept.items()})


def full_of(parts: Iterable[np.ndarray]) -> Kept | None:
    """The same of weights in parts, which need not be there together; None: they are not full."""
    counts = [(int(np.count_nonzero(part)), part.size) for part in parts]
    weights, size = (sum(one) for one in zip(*counts, strict=True))
    return Kept(weights, {}) if weights > (1 - LEAST_ZEROS) * size else None


def rows_that_pay(kept: Kept, pixels: int, read: int, written: int) -> int | None:
    """Rows of the blocks that are multiplied fastest; None: dense is."""
    if pixels < LEAST_PIXELS or not kept.blocks:
        return None
    cost = {rows: _cost(sum(n), rows, pixels, read, written) for rows, n in kept.blocks.items()}
    best = min(cost, key=lambda rows: cost[rows])
    tiles = -(-written // 16)
    far = _FAR if pixels * tiles * 64 > _CACHED_BYTES else 0.0
    dense = pixels * tiles * (read + far)
    return best if cost[best] * GAIN < dense else None


def _cost(entries: int, rows: int, pixels: int, read: int, written: int) -> float:
    if rows == TILE_ROWS:
        return entries * pixels * _ENTRY_OF_TILE
    vectors = -(-pixels // 16)
    panels = -(-vectors // PANEL)
    once, each = _ENTRY[rows]
    turns = vectors * (-(-read // 16) + -(-written // 16))
    return entries * (panels * once + vectors * each) + turns * _TURN


def int8_pays(fours: int, rows: int, read: int, written: int, matrices: bool) -> bool:
    """Whether a product of bytes is faster with so many fours of blocks (`sparse_product_u8`).

    Args:
        matrices: whether the CPU's dense kernel has matrix registers (`Target.byte_matrix`).
    """
    vectors, tiles = -(-rows // 16), -(-written // 16)
    cost = vectors * (fours * _FOUR + tiles * _TILE)
    dense = rows * tiles * read * (_IN_MATRICES if matrices else 1.0)
    return rows >= LEAST_PIXELS and cost * GAIN < dense
