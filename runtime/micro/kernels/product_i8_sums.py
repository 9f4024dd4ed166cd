"""Rows of bytes times weights on chips that add up 16 products in one instruction.

That is `vmlava` of Armv8.1-M, whose sum has to be in one of 7 registers: 3 rows by 2 columns of
weights are multiplied at once. Sums wait in a buffer until all of a row are there, 4 columns of
each row in turn; so codes may be written over the rows.
"""

from __future__ import annotations

from typing import Any

from headrace.micro.kernels.product_i8 import Product, stream_of
from headrace.micro.kernels.requantise import scaled, store_first, within
from headrace.targets.simd import (
    dot_sum,
    get_i32,
    int32,
    load_i32,
    load_u8,
    ptr_to_int,
    put_i32,
    shl_by,
    store_i8,
)
from headrace.targets.target import Target

ROWS, COLUMNS, LANES, PIECE = 3, 2, 4, 16
ROW = 4 * LANES  # bytes of sums
GROUP = ROWS * ROW


def _block(rows: int, a: Any, a_row: Any, stream: Any, k: Any, sums: Any) -> Any:
    """Up to 3 rows times 2 columns; gives the rest of the stream."""
    a0, b0 = int32(get_i32(stream)), int32(get_i32(stream + 4))
    a1, b1, a2, b2 = a0, b0, a0, b0
    stream, second, third = stream + 8, a, a
    if rows > 1:
        second = a + a_row
    if rows > 2:
        third = a + 2 * a_row
    left = k
    while left != 0:
        w, v = load_u8(stream, 1, 0), load_u8(stream + PIECE, 1, 0)
        x = load_u8(a, 1, 0)
        a0, b0 = dot_sum(a0, x, w), dot_sum(b0, x, v)
        if rows > 1:
            x = load_u8(second, 1, 0)
            a1, b1 = dot_sum(a1, x, w), dot_sum(b1, x, v)
        if rows > 2:
            x = load_u8(third, 1, 0)
            a2, b2 = dot_sum(a2, x, w), dot_sum(b2, x, v)
        a, second, third = a + PIECE, second + PIECE, third + PIECE
        stream, left = stream + 2 * PIECE, left - PIECE
    put_i32(sums, a0)
    put_i32(sums + 4, b0)
    if rows > 1:
        put_i32(sums + ROW, a1)
        put_i32(sums + (ROW + 4), b1)
    if rows > 2:
        put_i32(sums + 2 * ROW, a2)
        put_i32(sums + (2 * ROW + 4), b2)
    return stream


def _row(
    whole: bool, shifts_up: bool, c: Any, sums: Any, by: Any, down: Any, ups: Any, zero: Any,
    low: Any, high: Any, count: Any,
) -> None:  # fmt: skip
    """4 sums of a row to codes, of which all or `count` are stored."""
    total = load_i32(sums, 1, 0)
    if shifts_up:
        total = shl_by(total, load_i32(ups, 1, 0))
    codes = within(scaled(total, by, down) + zero, low, high)
    if whole:
        store_i8(c, codes, 0)
    else:
        store_first(c, codes, count, sums)


def _four(
    rows: int, whole: bool, up: bool, c: Any, c_row: Any, sums: Any, multipliers: Any, downs: Any,
    ups: Any, zero: Any, low: Any, high: Any, count: Any,
) -> None:  # fmt: skip
    """4 columns of all rows."""
    by, down = load_i32(multipliers, 1, 0), load_i32(downs, 1, 0)
    _row(whole, up, c, sums, by, down, ups, zero, low, high, count)
    if rows > 1:
        _row(whole, up, c + c_row, sums + ROW, by, down, ups, zero, low, high, count)
    if rows > 2:
        _row(whole, up, c + 2 * c_row, sums + 2 * ROW, by, down, ups, zero, low, high, count)


def _finish(
    rows: int, up: bool, c: Any, c_row: Any, sums: Any, multipliers: Any, downs: Any, ups: Any,
    zero: Any, low: Any, high: Any, m: Any,
) -> None:  # fmt: skip
    while m >= LANES:
        _four(rows, True, up, c, c_row, sums, multipliers, downs, ups, zero, low, high, m)
        c, sums, m = c + LANES, sums + GROUP, m - LANES
        multipliers, downs, ups = multipliers + ROW, downs + ROW, ups + ROW
    if m != 0:
        _four(rows, False, up, c, c_row, sums, multipliers, downs, ups, zero, low, high, m)


def _multiply(
    rows: int, a: Any, a_row: Any, stream: Any, c: Any, c_row: Any, k: Any, m: Any,
    multipliers: Any, downs: Any, ups: Any, sums: Any, zero: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    at, step, left = sums, int32(4 * COLUMNS), m
    while left > 0:
        stream = _block(rows, a, a_row, stream, k, at)
        # The other half of these 4 columns, or those behind all rows' of them.
        at, step, left = at + step, GROUP - step, left - COLUMNS
    if ptr_to_int(ups) == 0:
        _finish(rows, False, c, c_row, sums, multipliers, downs, ups, zero, low, high, m)
    else:
        _finish(rows, True, c, c_row, sums, multipliers, downs, ups, zero, low, high, m)


def product_of(target: Target) -> Product:
    """3 rows at once."""
    return Product(
        ROWS, LANES, PIECE, lambda weights, bias: stream_of(weights, bias, COLUMNS, PIECE),
        lambda k, m: -(-m // LANES) * GROUP, _multiply, __name__,
    )  # fmt: skip
