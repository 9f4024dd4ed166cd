"""Depthwise convolutions of short windows, each of which lies in one piece.

Each channel has a plane of its own, where the rows that windows see at a time lie in turn, column
by column. A new row takes the place of the oldest one, and then weights are loaded in another
order. How many channels are multiplied at once is the chip's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.micro.kernels.copying import fill_of
from headrace.targets.simd import arg_int, arg_ptr, int32, splat_i32, with_lanes
from headrace.targets.table import KernelFunction

GROUP, PIECE = 4, 16  # channels whose planes are there, and bytes of a window


def plane_bytes(reach: tuple[int, int], wide: int) -> int:
    """Of a channel, for rows of `wide` pixels: the last window is read in a whole piece."""
    return reach[0] * (wide - reach[1]) + PIECE


def packed(weights: np.ndarray, dilations: tuple[int, int]) -> np.ndarray:
    """Weights int8 [rows, columns, channels] by channels, column by column: [channels, bytes].

    In front are orders of their bytes, for each place of a window's first row.
    """
    rows, columns, channels = weights.shape
    reach = ((rows - 1) * dilations[0] + 1, (columns - 1) * dilations[1] + 1)
    whole = np.zeros((channels + -channels % GROUP, reach[1], reach[0]), np.int8)
    whole[:channels, :: dilations[1], :: dilations[0]] = weights.transpose(2, 1, 0)
    flat = np.pad(whole.reshape(len(whole), -1), ((0, 0), (0, PIECE - reach[0] * reach[1])))
    place = np.arange(PIECE)
    column, row = place // reach[0], place % reach[0]
    orders = [column * reach[0] + (row - first) % reach[0] for first in range(reach[0])]
    # What is behind the window's columns has weights of 0, in any order.
    inside = place < reach[0] * reach[1]
    table = np.where(inside, np.array(orders), place).astype(np.uint8)
    return np.concatenate([table, flat.view(np.uint8)])


def kernel_of(
    lanes: int,
    put_row: Callable[..., None],
    blank_row: Callable[..., None],
    line: Callable[..., None],
) -> KernelFunction:
    """A kernel of what differs from chip to chip.

    Args:
        lanes: of vectors.
        put_row: a row of the image to all planes, where pixels are `apart` bytes apart: (slot,
            image, channels, columns, plane, apart).
        blank_row: the same of a row that is outside of the image: (slot, outside, channels,
            columns, plane, apart).
        line: all channels of a row of windows, which begin `ahead` bytes apart: (planes, order,
            weights, rows and columns of a window, ahead, plane, channels, columns, bias,
            multipliers, downs, ups, zero, low, high, to, room).
    """
    fill = fill_of(lanes)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
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
        ring_columns = int32(arg_int(args, 21))
        zero, low, high = (
            splat_i32(arg_int(args, 22)), splat_i32(arg_int(args, 23)), splat_i32(arg_int(args, 24))
        )  # fmt: skip
        everything = ((channels + (GROUP - 1)) & -GROUP) * plane
        room = planes + ((everything + 3) & -4)
        fill(planes, outside, everything)
        ahead = step_across * ring_rows
        weights = orders + PIECE * ring_rows
        first, next_slot, next_y = int32(0), int32(0), y
        while made_rows > 0:
            while next_y < y + ring_rows:
                to = planes + (before * ring_rows + next_slot)
                if next_y >= 0 and next_y < rows:
                    if next_y >= y:
                        put_row(to, image + next_y * (columns * channels), channels, inner, plane,
                                ring_rows)  # fmt: skip
                else:
                    blank_row(to, outside, channels, inner, plane, ring_rows)
                next_y, next_slot = next_y + 1, next_slot + 1
                if next_slot == ring_rows:
                    next_slot = int32(0)
            line(planes, orders + PIECE * first, weights, ring_rows, ring_columns, ahead, plane,
                 channels, made_columns, bias, multipliers, downs, ups, zero, low, high, c,
                 room)  # fmt: skip
            c, y, made_rows = c + made_columns * channels, y + step_down, made_rows - 1
            first = first + step_down
            while first >= ring_rows:
                first = first - ring_rows

    return with_lanes(kernel, lanes)
