"""Depthwise convolutions on chips that multiply two pairs of 16-bit integers at once.

As in `depthwise_i8_windows` each channel has a plane of its own, in which a window is one piece: up
to 12 bytes here, whose weights are 6 registers of pairs. The sums of a row wait for the second
loop, which has what takes them to codes in registers.
"""

from __future__ import annotations

from typing import Any

from headrace.micro.kernels.copying import fill_of
from headrace.micro.kernels.depthwise_i8_windows import PIECE
from headrace.micro.kernels.requantise import scaled, within
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    dot_pairs,
    even_bytes,
    get_i32,
    get_u8,
    get_u32,
    int32,
    load_i32,
    odd_bytes,
    ptr_to_int,
    put_i32,
    put_u8,
    shl_by,
    splat_i32,
    store_i8,
    with_lanes,
)
from headrace.targets.table import KernelFunction

MOST = 12  # bytes of a window
_fill = fill_of(1)


def _put_row(slot: Any, image: Any, channels: Any, columns: Any, plane: Any, apart: Any) -> None:
    """A row of the image to all planes, where pixels are `apart` bytes apart."""
    left = channels
    while left > 0:
        to, source = slot, image
        end = ptr_to_int(slot + columns * apart)
        while ptr_to_int(to) != end:
            put_u8(to, get_u8(source))
            to, source = to + apart, source + channels
        slot, image, left = slot + plane, image + 1, left - 1


def _blank_row(
    slot: Any, outside: Any, channels: Any, columns: Any, plane: Any, apart: Any
) -> None:
    """The same of a row that is outside of the image."""
    while channels > 0:
        to, end = slot, ptr_to_int(slot + columns * apart)
        while ptr_to_int(to) != end:
            put_u8(to, outside)
            to = to + apart
        slot, channels = slot + plane, channels - 1


def _word(w: Any, order: Any) -> Any:
    """4 bytes in another order."""
    found = int32(get_u8(w + get_u8(order))) | (int32(get_u8(w + get_u8(order + 1))) << 8)
    found = found | (int32(get_u8(w + get_u8(order + 2))) << 16)
    return found | (int32(get_u8(w + get_u8(order + 3))) << 24)


def _sums(
    ahead: Any, to: Any, end: Any, x: Any, start: Any, first: Any, second: Any, third: Any
) -> None:
    """Of neighbours, whose windows begin `ahead` bytes apart."""
    a, b, c = even_bytes(first), even_bytes(second), even_bytes(third)
    d, e, f = odd_bytes(first), odd_bytes(second), odd_bytes(third)
    while ptr_to_int(to) != end:
        word = int32(get_u32(x))
        total = dot_pairs(dot_pairs(start, even_bytes(word), a), odd_bytes(word), d)
        word = int32(get_u32(x + 4))
        total = dot_pairs(dot_pairs(total, even_bytes(word), b), odd_bytes(word), e)
        word = int32(get_u32(x + 8))
        total = dot_pairs(dot_pairs(total, even_bytes(word), c), odd_bytes(word), f)
        put_i32(to, total)
        x, to = x + ahead, to + 4


def _codes(
    to: Any, channels: Any, at: Any, end: Any, by: Any, down: Any, up: Any, zero: Any, low: Any,
    high: Any,
) -> None:  # fmt: skip
    while ptr_to_int(at) != end:
        codes = scaled(shl_by(load_i32(at, 1, 0), up), by, down) + zero
        store_i8(to, within(codes, low, high), 0)
        at, to = at + 4, to + channels


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
    outside = int32(arg_int(args, 19))
    inner = int32(arg_int(args, 20))  # of the image's columns, those that windows see
    zero, low, high = (
        splat_i32(arg_int(args, 21)), splat_i32(arg_int(args, 22)), splat_i32(arg_int(args, 23))
    )  # fmt: skip
    everything = ((channels + 3) & -4) * plane
    sums = planes + ((everything + 3) & -4)
    _fill(planes, splat_i32(arg_int(args, 19)), everything)
    ahead = step_across * ring_rows
    sums_end = ptr_to_int(sums + 4 * made_columns)
    first, next_slot, next_y = int32(0), int32(0), y
    while made_rows > 0:
        while next_y < y + ring_rows:
            to = planes + (before * ring_rows + next_slot)
            if next_y >= 0 and next_y < rows:
                if next_y >= y:
                    _put_row(to, image + next_y * (columns * channels), channels, inner, plane,
                             ring_rows)  # fmt: skip
            else:
                _blank_row(to, outside, channels, inner, plane, ring_rows)
            next_y, next_slot = next_y + 1, next_slot + 1
            if next_slot == ring_rows:
                next_slot = int32(0)
        order = orders + PIECE * first
        left, x, w, to, of = channels, planes, orders + PIECE * ring_rows, c, int32(0)
        while left > 0:
            start = int32(get_i32(bias + of))
            _sums(ahead, sums, sums_end, x, start, _word(w, order), _word(w, order + 4),
                  _word(w, order + 8))  # fmt: skip
            by, down = load_i32(multipliers + of, 1, 0), load_i32(downs + of, 1, 0)
            up = splat_i32(0)
            if ptr_to_int(ups) != 0:
                up = load_i32(ups + of, 1, 0)
            _codes(to, channels, sums, sums_end, by, down, up, zero, low, high)
            x, w, to, of, left = x + plane, w + PIECE, to + 1, of + 4, left - 1
        c, y, made_rows = c + made_columns * channels, y + step_down, made_rows - 1
        first = first + step_down
        while first >= ring_rows:
            first = first - ring_rows


def kernel() -> KernelFunction:
    """For all chips, and fast on those."""
    return with_lanes(_kernel, 1)
