"""How a chip multiplies rows of bytes by weights: what products and convolutions are built of.

Weights lie in one stream in the order in which they are read, each block behind its biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from headrace.targets.target import Target

# (rows, a, a_row, stream, c, c_row, k, m, multipliers, downs, ups, scratch, zero, low, high): 1 to
# `Product.rows` rows of k bytes of a, times all weights, to codes in m columns of c. `ups` of 0: no
# sum is shifted up first. What is read of a row behind k bytes does not matter.
Multiply = Callable[..., None]


@dataclass(frozen=True)
class Product:
    """A chip's way.

    Attributes:
        rows: that are multiplied at once.
        lanes: of vectors, see `headrace.targets.simd.with_lanes`.
        piece: k is a multiple of so many bytes.
        packed: the stream of weights int8 [m, k] and biases int32 [m], with zeros for rows and
            columns that are missing.
        scratch_bytes: of k, m and how many rows there are at once, 1 to `rows`.
        multiply: for kernels to inline.
        module: whose text decides the code.
        order: of m columns, in which multipliers and shifts lie; weights and biases are given in
            their own.
    """

    rows: int
    lanes: int
    piece: int
    packed: Callable[[np.ndarray, np.ndarray], np.ndarray]
    scratch_bytes: Callable[[int, int, int], int]
    multiply: Multiply
    module: str
    order: Callable[[int], np.ndarray] = np.arange

    def whole(self, k: int) -> int:
        """Bytes of a row, with those that are multiplied by zero."""
        return -(-k // self.piece) * self.piece


def stream_of(weights: np.ndarray, bias: np.ndarray, rows: int, piece: int) -> np.ndarray:
    """Blocks of `rows` rows: their biases, then a piece of each in turn; uint8 [blocks, bytes]."""
    m, k = weights.shape
    whole = np.pad(weights, ((0, -m % rows), (0, -k % piece)))
    blocks, pieces = whole.shape[0] // rows, whole.shape[1] // piece
    in_turn = whole.reshape(blocks, rows, pieces, piece).swapaxes(1, 2).reshape(blocks, -1)
    biases = np.pad(bias.astype(np.int32), (0, -m % rows)).reshape(blocks, rows).view(np.int8)
    return np.concatenate([biases, in_turn], axis=1).view(np.uint8)


def product_of(target: Target) -> Product:
    """The way of a chip."""
    from headrace.micro.kernels import (
        product_i8_bytes,
        product_i8_columns,
        product_i8_pairs,
        product_i8_sums,
    )

    if target.vector_bytes == 16:
        if target.architecture.startswith("riscv"):
            return product_i8_columns.product_of(target)
        return product_i8_sums.product_of(target)
    if target.byte_pairs:
        return product_i8_pairs.product_of(target)
    return product_i8_bytes.product_of(target)
