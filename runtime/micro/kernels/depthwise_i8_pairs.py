"""`depthwise_i8_planes` on chips that multiply two pairs of 16-bit integers at once.

A window is up to 12 bytes, whose weights are 6 registers of pairs. The sums of a row wait for the
second loop, which has what takes them to codes in registers. Of 3x3, plainly scaled, all is in
registers at once.
"""

from __future__ import annotations

from typing import Any

from headrace.micro.kernels.depthwise_i8_planes import PIECE, kernel_of
from headrace.micro.kernels.requantise import plain as plain_code
from headrace.micro.kernels.requantise import plain_start, scaled, within
from headrace.targets.simd import (
    dot_pairs,
    even_bytes,
    get_i8,
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
)
from headrace.targets.table import KernelFunction

MOST = 12  # bytes of a window


def _put_row(slot: Any, image: Any, channels: Any, columns: Any, plane: Any, apart: Any) -> None:
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
    while channels > 0:
        to, end = slot, ptr_to_int(slot + columns * apart)
        while ptr_to_int(to) != end:
            store_i8(to, outside, 0)
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


def _pair(low: Any, high: Any) -> Any:
    """Two signed bytes from memory as 16-bit integers."""
    return (int32(get_i8(low)) & 0xFFFF) | (int32(get_i8(high)) << 16)


def _nine(
    ahead: Any, to: Any, channels: Any, count: Any, x: Any, w: Any, order: Any, start: Any,
    by: Any, shift: Any, plain: Any,
) -> None:  # fmt: skip
    """Codes of neighbours, of windows of 3x3 whose sums are plain."""
    u, v, t = w + get_u8(order), w + get_u8(order + 1), w + get_u8(order + 2)
    a, b, c, d = _pair(u, t), _pair(v, u + 3), _pair(v + 3, u + 6), _pair(t + 3, v + 6)
    e = int32(get_i8(t + 6))
    while count > 0:
        word = int32(get_u32(x))
        total = dot_pairs(dot_pairs(start, even_bytes(word), a), odd_bytes(word), b)
        word = int32(get_u32(x + 4))
        total = dot_pairs(dot_pairs(total, even_bytes(word), c), odd_bytes(word), d)
        total = total + int32(get_i8(x + 8)) * e
        store_i8(to, plain_code(splat_i32(total), by, shift, plain), 0)
        x, to, count = x + ahead, to + channels, count - 1


def _codes(
    to: Any, channels: Any, at: Any, end: Any, by: Any, down: Any, up: Any, zero: Any, low: Any,
    high: Any,
) -> None:  # fmt: skip
    while ptr_to_int(at) != end:
        codes = scaled(shl_by(load_i32(at, 1, 0), up), by, down) + zero
        store_i8(to, within(codes, low, high), 0)
        at, to = at + 4, to + channels


def kernel(are_single: bool) -> KernelFunction:
    """For all chips, and fast on those.

    Args:
        are_single: the chip has no vectors: without `ups` sums are plain.
    """

    def line(
        x: Any, order: Any, w: Any, window_rows: Any, window_columns: Any, ahead: Any, plane: Any,
        channels: Any, columns: Any, bias: Any, multipliers: Any, downs: Any, ups: Any, zero: Any,
        low: Any, high: Any, to: Any, sums: Any,
    ) -> None:  # fmt: skip
        end, left, of = ptr_to_int(sums + 4 * columns), channels, int32(0)
        nine = are_single and window_rows == 3 and window_columns == 3 and ptr_to_int(ups) == 0
        while left > 0:
            start = int32(get_i32(bias + of))
            by, down = load_i32(multipliers + of, 1, 0), load_i32(downs + of, 1, 0)
            if nine:
                shift = splat_i32(0) - down
                begin = plain_start(zero, shift)
                if ahead == 3:
                    _nine(3, to, channels, columns, x, w, order, start, by, shift, begin)
                else:
                    _nine(ahead, to, channels, columns, x, w, order, start, by, shift, begin)
            else:
                first, second, third = _word(w, order), _word(w, order + 4), _word(w, order + 8)
                _sums(ahead, sums, end, x, start, first, second, third)
                up = splat_i32(0)
                if ptr_to_int(ups) != 0:
                    up = load_i32(ups + of, 1, 0)
                _codes(to, channels, sums, end, by, down, up, zero, low, high)
            x, w, to, of, left = x + plane, w + PIECE, to + 1, of + 4, left - 1

    return kernel_of(1, _put_row, _blank_row, line)
