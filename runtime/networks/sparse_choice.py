"""Which weights are sparse enough, and for which kernel: a model of cost, all in one place.

Costs are in dense products of 16 weights with 16 lanes, as the dense kernel does them. Those of a
sparse entry and of turning 16 x 16 values were measured on AVX-512 (Sapphire Rapids, 16 to 12544
pixels, 16 to 1536 channels: the model is within a fifth). Elsewhere vectors are shorter for both
sides, and loads cost about as many products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.kernels.sparse_product import PANEL, ROWS, kept_blocks

LEAST_PIXELS = 16  # below, the memory binds, and vectors are half empty
GAIN = 1.1  # times as fast as dense, or it stays dense
_TURN = 165.0  # of 16 x 16 values
# Of an entry, for any number of vectors of pixels and for each of them, by rows of a block.
_ENTRY = {1: (1.6, 1.35), 4: (1.5, 3.1)}


@dataclass(frozen=True)
class Kept:
    """What is there of a matrix of weights.

    Attributes:
        weights: those that are not zero.
        blocks: those of each kind that have any, by rows of a block.
    """

    weights: int
    blocks: dict[int, int]


def kept_of(w: np.ndarray) -> Kept:
    """Of weights [outputs, channels read]."""
    weights = int(np.count_nonzero(w))
    if 2 * weights > w.size + w.size // 2:  # so full that no kernel gains: do not look closer
        return Kept(weights, {rows: w.size // rows for rows in ROWS})
    return Kept(weights, {rows: int(kept_blocks(w, rows).sum()) for rows in ROWS})


def rows_that_pay(kept: Kept, pixels: int, read: int, written: int) -> int | None:
    """Rows of the blocks that are multiplied fastest; None: dense is."""
    if pixels < LEAST_PIXELS:
        return None
    cost = {rows: _cost(n, rows, pixels, read, written) for rows, n in kept.blocks.items()}
    best = min(cost, key=lambda rows: cost[rows])
    dense = pixels * read * -(-written // 16)
    return best if cost[best] * GAIN < dense else None


def _cost(entries: int, rows: int, pixels: int, read: int, written: int) -> float:
    vectors = -(-pixels // 16)
    panels = -(-vectors // PANEL)
    once, each = _ENTRY[rows]
    turns = vectors * (-(-read // 16) + -(-written // 16))
    return entries * (panels * once + vectors * each) + turns * _TURN
