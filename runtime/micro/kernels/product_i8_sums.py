"""Rows of bytes times weights on chips that add up 16 products in one instruction.

That is `vmlava` of Armv8.1-M, whose sum has to be in one of 7 registers: 3 rows by 2 columns of
weights are multiplied at once, or one row by 4. Sums wait in a buffer until all of a row are there,
4 columns of each row in turn; so codes may be written over the rows. Of 8 columns these are the
even ones and then the odd ones, which become bytes together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.micro.kernels.product_i8 import Product, stream_of
from headrace.micro.kernels.requantise import scaled, shifted_down, store_first, within
from headrace.targets.simd import (
    dot_sum,
    get_i32,
    int32,
    load_i32,
    load_u8,
    ptr_to_int,
    put_i32,
    shl_by,
    splat_i32,
    store_i8,
    store_in_turn,
)
from headrace.targets.target import Target

ROWS, COLUMNS, LANES, PIECE = 3, 2, 4, 16
ROW = 4 * LANES  # bytes of sums


def _pieces(
    rows: int, count: int, a: Any, second: Any, third: Any, stream: Any, a0: Any, b0: Any, a1: Any,
    b1: Any, a2: Any, b2: Any,
) -> Any:  # fmt: skip
    """So many pieces of 2 or 3 rows and of 2 columns."""
    for i in range(count):
        at, of = i * PIECE, 2 * i * PIECE
        w, v = load_u8(stream + of, 1, 0), load_u8(stream + (of + PIECE), 1, 0)
        x = load_u8(a + at, 1, 0)
        a0, b0 = dot_sum(a0, x, w), dot_sum(b0, x, v)
        x = load_u8(second + at, 1, 0)
        a1, b1 = dot_sum(a1, x, w), dot_sum(b1, x, v)
        if rows > 2:
            x = load_u8(third + at, 1, 0)
            a2, b2 = dot_sum(a2, x, w), dot_sum(b2, x, v)
    return a0, b0, a1, b1, a2, b2


def _block(
    rows: int, at_once: int, alone: bool, a: Any, a_row: Any, stream: Any, k: Any, sums: Any
) -> Any:
    """2 or 3 rows times 2 columns; gives the rest of the stream.

    Args:
        at_once: 1, 2 or 4 pieces, of which there are some: LLVM checks once less.
        alone: whether these are all there are: then all pointers stay in registers.
    """
    a0, b0 = int32(get_i32(stream)), int32(get_i32(stream + 4))
    a1, b1, a2, b2 = a0, b0, a0, b0
    stream, second, third, ahead = stream + 8, a + a_row, a, at_once * PIECE
    if rows > 2:
        third = a + 2 * a_row
    if alone:
        a0, b0, a1, b1, a2, b2 = _pieces(
            rows, at_once, a, second, third, stream, a0, b0, a1, b1, a2, b2
        )
        stream = stream + 2 * ahead
    else:
        more = int32(1)
        while more != 0:
            a0, b0, a1, b1, a2, b2 = _pieces(
                rows, at_once, a, second, third, stream, a0, b0, a1, b1, a2, b2
            )
            a, second, third = a + ahead, second + ahead, third + ahead
            stream, k = stream + 2 * ahead, k - ahead
            more = k
    put_i32(sums, a0)
    put_i32(sums + 4, b0)
    put_i32(sums + ROW, a1)
    put_i32(sums + (ROW + 4), b1)
    if rows > 2:
        put_i32(sums + 2 * ROW, a2)
        put_i32(sums + (2 * ROW + 4), b2)
    return stream


def _blocks(
    rows: int, at_once: int, alone: bool, a: Any, a_row: Any, stream: Any, k: Any, sums: Any, m: Any
) -> None:
    """2 or 3 rows times all columns."""
    step = int32(4 * COLUMNS)
    while m > 0:
        stream = _block(rows, at_once, alone, a, a_row, stream, k, sums)
        # The other half of these 4 columns, or those behind all rows' of them.
        sums, step, m = sums + step, rows * ROW - step, m - COLUMNS


def _one_row(at_once: int, a: Any, stream: Any, k: Any, sums: Any, m: Any) -> None:
    """1 row times all columns, 4 at a time."""
    ahead = at_once * PIECE
    while m > 0:
        x, other, left = a, stream + (2 * k + 8), k - ahead
        s0, s1 = int32(get_i32(stream)), int32(get_i32(stream + 4))
        s2, s3 = int32(get_i32(other)), int32(get_i32(other + 4))
        stream, other = stream + 8, other + 8
        s0, s1, s2, s3 = _four_columns(at_once, x, stream, other, s0, s1, s2, s3)
        while left != 0:
            x, stream, other = x + ahead, stream + 2 * ahead, other + 2 * ahead
            s0, s1, s2, s3 = _four_columns(at_once, x, stream, other, s0, s1, s2, s3)
            left = left - ahead
        put_i32(sums, s0)
        put_i32(sums + 4, s1)
        put_i32(sums + 8, s2)
        put_i32(sums + 12, s3)
        stream, sums, m = other + 2 * ahead, sums + ROW, m - LANES


def _four_columns(
    count: int, a: Any, stream: Any, other: Any, s0: Any, s1: Any, s2: Any, s3: Any
) -> Any:
    """So many pieces of 1 row."""
    for i in range(count):
        x, of = load_u8(a + i * PIECE, 1, 0), 2 * i * PIECE
        s0 = dot_sum(s0, x, load_u8(stream + of, 1, 0))
        s1 = dot_sum(s1, x, load_u8(stream + (of + PIECE), 1, 0))
        s2 = dot_sum(s2, x, load_u8(other + of, 1, 0))
        s3 = dot_sum(s3, x, load_u8(other + (of + PIECE), 1, 0))
    return s0, s1, s2, s3


def _codes(
    up: bool, sums: Any, by: Any, down: Any, ups: Any, zero: Any, low: Any, high: Any
) -> Any:
    """Of 4 sums of a row; of plain ones without the zero point and bounds."""
    total = load_i32(sums, 1, 0)
    if not up:
        return shifted_down(total, by, down)
    return within(scaled(shl_by(total, load_i32(ups, 1, 0)), by, down) + zero, low, high)


def _eight(
    rows: int, up: bool, c: Any, c_row: Any, sums: Any, multipliers: Any, downs: Any, ups: Any,
    zero: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    """8 columns of all rows: sums to codes."""
    by, down = load_i32(multipliers, 1, 0), load_i32(downs, 1, 0)
    other_by, other_down = load_i32(multipliers + ROW, 1, 0), load_i32(downs + ROW, 1, 0)
    other, other_ups, more = sums + rows * ROW, ups + ROW, zero
    if up:
        more = splat_i32(0)
    for row in range(rows):
        evens = _codes(up, sums + row * ROW, by, down, ups, zero, low, high)
        odds = _codes(up, other + row * ROW, other_by, other_down, other_ups, zero, low, high)
        store_in_turn(c, evens, odds, more)
        c = c + c_row


def _four(
    rows: int, up: bool, c: Any, c_row: Any, sums: Any, multipliers: Any, downs: Any, ups: Any,
    zero: Any, low: Any, high: Any, count: Any,
) -> None:  # fmt: skip
    """Up to 4 columns of a row after the other."""
    by, down = load_i32(multipliers, 1, 0), load_i32(downs, 1, 0)
    left = int32(rows)
    while left != 0:
        codes = _codes(up, sums, by, down, ups, zero, low, high)
        if not up:
            codes = within(codes + zero, low, high)
        if count >= LANES:
            store_i8(c, codes, 0)
        else:
            store_first(c, codes, count, sums)
        c, sums, left = c + c_row, sums + ROW, left - 1


def _finish(
    rows: int, up: bool, c: Any, c_row: Any, sums: Any, multipliers: Any, downs: Any, ups: Any,
    zero: Any, low: Any, high: Any, m: Any,
) -> None:  # fmt: skip
    while m >= 2 * LANES:
        _eight(rows, up, c, c_row, sums, multipliers, downs, ups, zero, low, high)
        c, sums, m = c + 2 * LANES, sums + 2 * rows * ROW, m - 2 * LANES
        multipliers, downs, ups = multipliers + 2 * ROW, downs + 2 * ROW, ups + 2 * ROW
    while m > 0:
        _four(rows, up, c, c_row, sums, multipliers, downs, ups, zero, low, high, m)
        c, sums, m = c + LANES, sums + rows * ROW, m - LANES
        multipliers, downs, ups = multipliers + ROW, downs + ROW, ups + ROW


def _multiply(
    rows: int, a: Any, a_row: Any, stream: Any, c: Any, c_row: Any, k: Any, m: Any,
    multipliers: Any, downs: Any, ups: Any, sums: Any, zero: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    if rows == 1 and k & 3 * PIECE == 0:
        _one_row(4, a, stream, k, sums, m)
    elif rows == 1:
        _one_row(1, a, stream, k, sums, m)
    elif rows == ROWS and k == 4 * PIECE:
        _blocks(rows, 4, True, a, a_row, stream, k, sums, m)
    elif rows == ROWS and k == 2 * PIECE:
        _blocks(rows, 2, True, a, a_row, stream, k, sums, m)
    elif rows == ROWS and k == PIECE:
        _blocks(rows, 1, True, a, a_row, stream, k, sums, m)
    elif k & 3 * PIECE == 0:
        _blocks(rows, 4, False, a, a_row, stream, k, sums, m)
    else:
        _blocks(rows, 1, False, a, a_row, stream, k, sums, m)
    if ptr_to_int(ups) == 0:
        _finish(rows, False, c, c_row, sums, multipliers, downs, ups, zero, low, high, m)
    else:
        _finish(rows, True, c, c_row, sums, multipliers, downs, ups, zero, low, high, m)


def order(m: int) -> np.ndarray:
    """Of columns: of each 8 the even ones and then the odd ones."""
    found = np.arange(m)
    whole = m - m % (2 * LANES)
    found[:whole] = found[:whole].reshape(-1, LANES, 2).swapaxes(1, 2).reshape(-1)
    return found


def packed(weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """`stream_of` blocks of 2 columns, with zeros up to whole fours."""
    m = len(weights)
    more = -m % LANES
    weights = np.pad(weights[order(m)], ((0, more), (0, 0)))
    return stream_of(weights, np.pad(bias[order(m)], (0, more)), COLUMNS, PIECE)


def product_of(target: Target) -> Product:
    """3 rows at once."""
    return Product(
        ROWS, LANES, PIECE, packed, lambda k, m, rows: -(-m // LANES) * rows * ROW, _multiply,
        __name__, order,
    )  # fmt: skip
