"""Sums in single registers to int8 codes, for kernels to inline; `ups` of 0: they are plain."""

from __future__ import annotations

from typing import Any

from headrace.micro.kernels.requantise import plain, plain_start, scaled, within
from headrace.targets.simd import load_i32, ptr_to_int, shl_by, splat_i32, store_i8


def put_code(
    c: Any, total: Any, by: Any, down: Any, up: Any, zero: Any, low: Any, high: Any
) -> None:
    codes = scaled(shl_by(splat_i32(total), up), by, down) + zero
    store_i8(c, within(codes, low, high), 0)


def column(
    rows: int, c: Any, c_row: Any, first: Any, second: Any, multipliers: Any, downs: Any,
    ups: Any, zero: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    """Sums of a column of weights to codes."""
    by, down = load_i32(multipliers, 1, 0), load_i32(downs, 1, 0)
    if ptr_to_int(ups) == 0:
        shift = splat_i32(0) - down
        start = plain_start(zero, shift)
        store_i8(c, plain(splat_i32(first), by, shift, start), 0)
        if rows == 2:
            store_i8(c + c_row, plain(splat_i32(second), by, shift, start), 0)
    else:
        up = load_i32(ups, 1, 0)
        put_code(c, first, by, down, up, zero, low, high)
        if rows == 2:
            put_code(c + c_row, second, by, down, up, zero, low, high)


def next_of(ups: Any) -> Any:
    """The place of the next column's shift, if there are shifts up."""
    if ptr_to_int(ups) != 0:
        ups = ups + 4
    return ups
