"""`depthwise_i8_planes` on chips that add up 16 products in one instruction.

That is `vmlava` of Armv8.1-M, which has no product of vectors that adds. Sums of 4 channels become
a vector.
"""

from __future__ import annotations

from typing import Any

from headrace.micro.kernels.depthwise_i8_planes import PIECE, kernel_of
from headrace.micro.kernels.requantise import scaled, store_first, within
from headrace.targets.simd import (
    dot_sum,
    four_i32,
    gather_bytes,
    int32,
    iota_i32,
    load_i32,
    load_u8,
    load_u8_i32,
    ptr_to_int,
    scatter_i8,
    shl_by,
    splat_i32,
    store_i8,
)
from headrace.targets.table import KernelFunction

LANES = 4


def _put_row(slot: Any, image: Any, channels: Any, columns: Any, plane: Any, apart: Any) -> None:
    planes, left = iota_i32() * splat_i32(plane), channels
    while left > 0:
        to, source, pixels = slot, image, columns
        while pixels > 0:
            scatter_i8(to, load_u8_i32(source, 1, 0), planes)
            to, source, pixels = to + apart, source + channels, pixels - 1
        slot, image, left = slot + LANES * plane, image + LANES, left - LANES


def _blank_row(
    slot: Any, outside: Any, channels: Any, columns: Any, plane: Any, apart: Any
) -> None:
    planes = iota_i32() * splat_i32(plane)
    while channels > 0:
        to, pixels = slot, columns
        while pixels > 0:
            scatter_i8(to, outside, planes)
            to, pixels = to + apart, pixels - 1
        slot, channels = slot + LANES * plane, channels - LANES


def _pixels(
    short: bool, ahead: Any, count: Any, x: Any, plane: Any, w0: Any, w1: Any, w2: Any, w3: Any,
    bias: Any,
    multipliers: Any, downs: Any, ups: Any, zero: Any, low: Any, high: Any, to: Any, channels: Any,
    left: Any, room: Any,
) -> None:  # fmt: skip
    """4 channels of neighbours, whose windows begin `ahead` bytes apart.

    Args:
        short: all 4 channels are there, and no sum is shifted up first.
    """
    y, z, v = x + plane, x + 2 * plane, x + 3 * plane
    none = int32(0)
    while count > 0:
        a, b = dot_sum(none, load_u8(x, 1, 0), w0), dot_sum(none, load_u8(y, 1, 0), w1)
        c, d = dot_sum(none, load_u8(z, 1, 0), w2), dot_sum(none, load_u8(v, 1, 0), w3)
        sums = four_i32(a, b, c, d) + load_i32(bias, 1, 0)
        if not short and ptr_to_int(ups) != 0:
            sums = shl_by(sums, load_i32(ups, 1, 0))
        sums = scaled(sums, load_i32(multipliers, 1, 0), load_i32(downs, 1, 0))
        codes = within(sums + zero, low, high)
        if short or left >= LANES:
            store_i8(to, codes, 0)
        else:
            store_first(to, codes, left, room)
        x, y, z, v = x + ahead, y + ahead, z + ahead, v + ahead
        to, count = to + channels, count - 1


def _line(
    x: Any, orders: Any, w: Any, window_rows: Any, window_columns: Any, ahead: Any, plane: Any,
    channels: Any, columns: Any, bias: Any, multipliers: Any, downs: Any, ups: Any, zero: Any,
    low: Any, high: Any, to: Any, room: Any,
) -> None:  # fmt: skip
    order = load_u8(orders, 1, 0)
    left, of = channels, int32(0)
    while left > 0:
        w0, w1 = gather_bytes(w, order), gather_bytes(w + PIECE, order)
        w2, w3 = gather_bytes(w + 2 * PIECE, order), gather_bytes(w + 3 * PIECE, order)
        up = ups
        if ptr_to_int(ups) != 0:
            up = ups + of
        short = left >= LANES and ptr_to_int(ups) == 0
        if short and ahead == 3:
            _pixels(True, 3, columns, x, plane, w0, w1, w2, w3, bias + of, multipliers + of,
                    downs + of, up, zero, low, high, to, channels, left, room)  # fmt: skip
        elif short and ahead == 6:
            _pixels(True, 6, columns, x, plane, w0, w1, w2, w3, bias + of, multipliers + of,
                    downs + of, up, zero, low, high, to, channels, left, room)  # fmt: skip
        else:
            _pixels(False, ahead, columns, x, plane, w0, w1, w2, w3, bias + of, multipliers + of,
                    downs + of, up, zero, low, high, to, channels, left, room)  # fmt: skip
        x, w, to = x + 4 * plane, w + 4 * PIECE, to + LANES
        of, left = of + 4 * LANES, left - LANES


def kernel() -> KernelFunction:
    """For all chips, and fast on those."""
    return kernel_of(LANES, _put_row, _blank_row, _line)
