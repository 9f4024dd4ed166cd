"""Rows of bytes times weights on chips that multiply single numbers.

Sums of 2 rows by 2 columns are in registers: 4 loads for 4 products. Rows are copied first, so that
codes may be written over them.
"""

from __future__ import annotations

from typing import Any

from headrace.micro.kernels.copying import BEHIND, copy_of
from headrace.micro.kernels.product_i8 import Product, stream_of
from headrace.micro.kernels.single_sums import column, next_of
from headrace.targets.simd import dot_sum, get_i32, int32, load_u8, ptr_to_int
from headrace.targets.target import Target

ROWS, COLUMNS, PIECE = 2, 2, 4
_copy = copy_of(1)


def _multiply(
    rows: int, a: Any, a_row: Any, stream: Any, c: Any, c_row: Any, k: Any, m: Any,
    multipliers: Any, downs: Any, ups: Any, copied: Any, zero: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    _copy(copied, a, k)
    if rows == 2:
        _copy(copied + k, a + a_row, k)
    while m > 0:
        a0, b0 = int32(get_i32(stream)), int32(get_i32(stream + 4))
        a1, b1 = a0, b0
        x, stream, end = copied, stream + 8, ptr_to_int(copied + k)
        y = copied + k
        while ptr_to_int(x) != end:
            w, v, u = load_u8(stream, 1, 0), load_u8(stream + PIECE, 1, 0), load_u8(x, 1, 0)
            a0, b0 = dot_sum(a0, u, w), dot_sum(b0, u, v)
            if rows == 2:
                u = load_u8(y, 1, 0)
                a1, b1 = dot_sum(a1, u, w), dot_sum(b1, u, v)
            x, y, stream = x + PIECE, y + PIECE, stream + 2 * PIECE
        column(rows, c, c_row, a0, a1, multipliers, downs, ups, zero, low, high)
        if m > 1:
            column(rows, c + 1, c_row, b0, b1, multipliers + 4, downs + 4, next_of(ups), zero, low,
                   high)  # fmt: skip
        ups = next_of(next_of(ups))
        c, m, multipliers, downs = c + 2, m - 2, multipliers + 8, downs + 8


def product_of(target: Target) -> Product:
    """2 rows at once."""
    return Product(
        ROWS, 1, PIECE, lambda weights, bias: stream_of(weights, bias, COLUMNS, PIECE),
        lambda k, m: ROWS * (-(-k // PIECE) * PIECE) + BEHIND, _multiply, __name__,
    )  # fmt: skip
