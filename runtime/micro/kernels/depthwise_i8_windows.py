"""Depthwise convolutions on chips that add up 16 products in one instruction.

That is `vmlava` of Armv8.1-M, which has no product of vectors that adds. So a window is to lie in
one piece of 16 bytes: each channel has a plane of its own, where the rows that windows see at a
time lie in turn, column by column. A new row takes the place of the oldest one, and then weights
are loaded in another order. Sums of 4 channels become a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.micro.kernels.copying import fill_of
from headrace.micro.kernels.requantise import scaled, store_first, within
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
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
    with_lanes,
)
from headrace.targets.table import KernelFunction

LANES, PIECE = 4, 16


def plane_bytes(reach: tuple[int, int], wide: int) -> int:
    """Of a channel, for rows of `wide` pixels: the last window is read in a whole piece."""
    return reach[0] * (wide - reach[1]) + PIECE


def packed(weights: np.ndarray, dilations: tuple[int, int]) -> np.ndarray:
    """Weights int8 [rows, columns, channels] by channels, column by column: [channels, bytes].

    In front are orders of their bytes, for each place of a window's first row.
    """
    rows, columns, channels = weights.shape
    reach = ((rows - 1) * dilations[0] + 1, (columns - 1) * dilations[1] + 1)
    whole = np.zeros((channels + -channels % LANES, reach[1], reach[0]), np.int8)
    whole[:channels, :: dilations[1], :: dilations[0]] = weights.transpose(2, 1, 0)
    flat = np.pad(whole.reshape(len(whole), -1), ((0, 0), (0, PIECE - reach[0] * reach[1])))
    place = np.arange(PIECE)
    column, row = place // reach[0], place % reach[0]
    orders = [column * reach[0] + (row - first) % reach[0] for first in range(reach[0])]
    # What is behind the window's columns has weights of 0, in any order.
    inside = place < reach[0] * reach[1]
    table = np.where(inside, np.array(orders), place).astype(np.uint8)
    return np.concatenate([table, flat.view(np.uint8)])


_fill = fill_of(LANES)


def _put_row(
    slot: Any, image: Any, channels: Any, columns: Any, plane: Any, apart: Any, planes: Any
) -> None:
    """A row of the image to all planes, where pixels are `apart` bytes apart."""
    left = channels
    while left > 0:
        to, source, pixels = slot, image, columns
        while pixels > 0:
            scatter_i8(to, load_u8_i32(source, 1, 0), planes)
            to, source, pixels = to + apart, source + channels, pixels - 1
        slot, image, left = slot + 4 * plane, image + LANES, left - LANES


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


def _kernel(args: Any, thread: Any, n_threads: Any) -> None:
    image, orders, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
    bias, multipliers, downs = arg_ptr(args, 3), arg_ptr(args, 4), arg_ptr(args, 5)
    ups, planes = arg_ptr(args, 6), arg_ptr(args, 7)
    ring_rows, plane = int32(arg_int(args, 8)), int32(arg_int(args, 9))
    rows, columns, channels = (
        int32(arg_int(args, 10)), int32(arg_int(args, 11)), int32(arg_int(args, 12))
    )  # fmt: skip
    made_rows, made_columns = int32(arg_int(args, 13)), int32(arg_int(args, 14))
    step_down, step_across = int32(arg_int(args, 15)), int32(arg_int(args, 16))
    y, before = int32(arg_int(args, 17)), -int32(arg_int(args, 18))
    outside = splat_i32(arg_int(args, 19))
    inner = int32(arg_int(args, 20))  # of the image's columns, those that windows see
    zero, low, high = (
        splat_i32(arg_int(args, 21)), splat_i32(arg_int(args, 22)), splat_i32(arg_int(args, 23))
    )  # fmt: skip
    groups = (channels + 3) >> 2
    everything = 4 * groups * plane
    room = planes + everything
    _fill(planes, outside, everything)
    lanes = iota_i32() * splat_i32(plane)
    ahead = step_across * ring_rows
    weights = orders + PIECE * ring_rows
    first, next_slot, next_y = int32(0), int32(0), y
    while made_rows > 0:
        while next_y < y + ring_rows:
            to = planes + (before * ring_rows + next_slot)
            if next_y >= 0 and next_y < rows:
                if next_y >= y:
                    _put_row(to, image + next_y * (columns * channels), channels, inner, plane,
                             ring_rows, lanes)  # fmt: skip
            else:
                _blank_row(to, outside, groups, inner, plane, ring_rows, lanes)
            next_y, next_slot = next_y + 1, next_slot + 1
            if next_slot == ring_rows:
                next_slot = int32(0)
        order = load_u8(orders + PIECE * first, 1, 0)
        left, x, w, to, of = channels, planes, weights, c, int32(0)
        while left > 0:
            w0, w1 = gather_bytes(w, order), gather_bytes(w + PIECE, order)
            w2, w3 = gather_bytes(w + 2 * PIECE, order), gather_bytes(w + 3 * PIECE, order)
            up = ups
            if ptr_to_int(ups) != 0:
                up = ups + of
            short = left >= LANES and ptr_to_int(ups) == 0
            if short and ahead == 3:
                _pixels(True, 3, made_columns, x, plane, w0, w1, w2, w3, bias + of,
                        multipliers + of, downs + of, up, zero, low, high, to, channels, left,
                        room)  # fmt: skip
            elif short and ahead == 6:
                _pixels(True, 6, made_columns, x, plane, w0, w1, w2, w3, bias + of,
                        multipliers + of, downs + of, up, zero, low, high, to, channels, left,
                        room)  # fmt: skip
            else:
                _pixels(False, ahead, made_columns, x, plane, w0, w1, w2, w3, bias + of,
                        multipliers + of, downs + of, up, zero, low, high, to, channels, left,
                        room)  # fmt: skip
            x, w, to = x + 4 * plane, w + 4 * PIECE, to + LANES
            of, left = of + 4 * LANES, left - LANES
        c, y, made_rows = c + made_columns * channels, y + step_down, made_rows - 1
        first = first + step_down
        while first >= ring_rows:
            first = first - ring_rows


def _blank_row(
    slot: Any, outside: Any, groups: Any, columns: Any, plane: Any, apart: Any, planes: Any
) -> None:
    """The same of a row that is outside of the image."""
    while groups > 0:
        to, pixels = slot, columns
        while pixels > 0:
            scatter_i8(to, outside, planes)
            to, pixels = to + apart, pixels - 1
        slot, groups = slot + 4 * plane, groups - 1


def kernel() -> KernelFunction:
    """For all chips, and fast on those."""
    return with_lanes(_kernel, LANES)
