"""Rows of bytes times weights, two products an instruction (`smlad` of Arm's DSP extension).

Bytes of rows become 16-bit integers once for all weights, bytes 0 and 2 of four in a register and 1
and 3 in another, as `sxtb16` makes them of weights when they are used. Registers hold sums of 2
rows by 2 columns of weights. Source: Lai et al., "CMSIS-NN" (1801.06601), section 3.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.micro.kernels.product_i8 import Product, stream_of
from headrace.micro.kernels.single_sums import column, next_of
from headrace.targets.simd import (
    dot_pairs,
    even_bytes,
    get_i32,
    get_u32,
    int32,
    odd_bytes,
    ptr_to_int,
    put_i32,
)
from headrace.targets.target import Target

COLUMNS, PIECE = 2, 8


def _widened(a: Any, to: Any, k: Any) -> None:
    """Bytes as 16-bit integers."""
    while k > 0:
        word = int32(get_u32(a))
        put_i32(to, even_bytes(word))
        put_i32(to + 4, odd_bytes(word))
        a, to, k = a + 4, to + 8, k - 4


def _four(rows: int, x: Any, y: Any, stream: Any, a0: Any, a1: Any, b0: Any, b1: Any) -> Any:
    """4 bytes of each row and column: x and y are widened."""
    w, v = int32(get_i32(stream)), int32(get_i32(stream + 4))
    p, q = int32(get_i32(x)), int32(get_i32(x + 4))
    even, odd = even_bytes(w), odd_bytes(w)
    a0 = dot_pairs(dot_pairs(a0, p, even), q, odd)
    if rows == 2:
        r, s = int32(get_i32(y)), int32(get_i32(y + 4))
        a1 = dot_pairs(dot_pairs(a1, r, even), s, odd)
    even, odd = even_bytes(v), odd_bytes(v)
    b0 = dot_pairs(dot_pairs(b0, p, even), q, odd)
    if rows == 2:
        b1 = dot_pairs(dot_pairs(b1, r, even), s, odd)
    return a0, a1, b0, b1


def _multiply(
    rows: int, a: Any, a_row: Any, stream: Any, c: Any, c_row: Any, k: Any, m: Any,
    multipliers: Any, downs: Any, ups: Any, wide: Any, zero: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    other = wide
    _widened(a, wide, k)
    if rows == 2:
        other = wide + 2 * k
        _widened(a + a_row, other, k)
    while m > 0:
        a0, b0 = int32(get_i32(stream)), int32(get_i32(stream + 4))
        a1, b1 = a0, b0
        x, y, stream, end = wide, other, stream + 8, ptr_to_int(wide + 2 * k)
        while ptr_to_int(x) != end:
            a0, a1, b0, b1 = _four(rows, x, y, stream, a0, a1, b0, b1)
            a0, a1, b0, b1 = _four(rows, x + 8, y + 8, stream + 8, a0, a1, b0, b1)
            x, y, stream = x + 2 * PIECE, y + 2 * PIECE, stream + 2 * PIECE
        column(rows, c, c_row, a0, a1, multipliers, downs, ups, zero, low, high)
        if m > 1:
            column(rows, c + 1, c_row, b0, b1, multipliers + 4, downs + 4, next_of(ups), zero,
                   low, high)  # fmt: skip
        ups = next_of(next_of(ups))
        c, m, multipliers, downs = c + 2, m - 2, multipliers + 8, downs + 8


def product_of(target: Target) -> Product:
    """2 rows at once."""

    return Product(
        2, 1, PIECE, lambda weights, bias: stream_of(_in_turn(weights), bias, COLUMNS, 4),
        lambda k, m: 4 * (-(-k // PIECE) * PIECE), _multiply, __name__,
    )  # fmt: skip


def _in_turn(weights: np.ndarray) -> np.ndarray:
    """Weights with columns of zeros up to whole pieces."""
    return np.pad(weights, ((0, 0), (0, -weights.shape[1] % PIECE)))
