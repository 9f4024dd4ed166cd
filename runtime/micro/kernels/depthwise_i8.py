"""Convolutions of each channel for itself, of images of int8 codes.

The rows that windows see at a time wait in a ring of rows, with the code of zero beside them. So
no window is cut off, and a row of the result may lie where rows of the image were. In the ring and
in the weights channels lie in groups of 4: those of a row's pixels one behind the other. A vector
holds the sums of a group's channels (chips without vectors: one channel), and 4 neighbours are
computed at once: weights are loaded once for them, and where windows overlap so are codes. Source
for computing in place: Lin et al., "MCUNetV2" (2110.15352), and TinyEngine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.micro.fixed_point import multiplied
from headrace.micro.kernels import copying, depthwise_i8_pairs, depthwise_i8_windows
from headrace.micro.kernels import depthwise_i8_planes as planes_of
from headrace.micro.kernels.convolution_i8 import geometry, made_size
from headrace.micro.kernels.depthwise_i8_planes import GROUP
from headrace.micro.kernels.matmul_i8 import ENDS, scales_for, scaling_of
from headrace.micro.kernels.product_i8 import product_of
from headrace.micro.kernels.requantise import by_lanes, lanes_of, reach_of, requantised, store_first
from headrace.micro.network import Windows
from headrace.micro.windows import windows_of
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    get_u8,
    get_u32,
    int32,
    load_i8_i32,
    load_i32,
    ptr_to_int,
    put_i32,
    put_u8,
    shl_by,
    splat_i32,
    store_i8,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME = "depthwise_i8"
WINDOWS = "depthwise_i8_windows"


def _adds_up_sixteen(target: Target) -> bool:
    of = product_of(target)
    return (of.piece, of.lanes) == (planes_of.PIECE, depthwise_i8_windows.LANES)


def fits(
    target: Target, windows: Windows, read: tuple[int, int, int], made: tuple[int, int, int]
) -> bool:
    """Whether windows are short enough for the kernel of those."""
    n_bytes = ring_rows(windows) * ring_columns(1, windows)
    most = planes_of.PIECE if _adds_up_sixteen(target) else depthwise_i8_pairs.MOST
    return n_bytes <= most and read[2] == made[2]


def kernel_for(
    target: Target, windows: Windows, read: tuple[int, int, int], made: tuple[int, int, int]
) -> str:
    """The faster one, of images [rows, columns, channels]."""
    is_fast = _adds_up_sixteen(target) or target.byte_pairs
    return WINDOWS if is_fast and fits(target, windows, read, made) else NAME


def _build_windows(target: Target) -> KernelFunction:
    if _adds_up_sixteen(target):
        return depthwise_i8_windows.kernel()
    return depthwise_i8_pairs.kernel(lanes_of(target) == 1)


def ring_columns(made_columns: int, windows: Windows) -> int:
    """Pixels of a row in the ring."""
    reach = (windows.taps[1] - 1) * windows.dilations[1] + 1
    return (made_columns - 1) * windows.strides[1] + reach


def ring_rows(windows: Windows) -> int:
    """Rows in the ring."""
    return (windows.taps[0] - 1) * windows.dilations[0] + 1


def scratch_bytes(made: tuple[int, int, int], windows: Windows) -> int:
    """Of the ring, for a result of so many rows, columns and channels, and a vector's bytes."""
    groups = -(-made[2] // GROUP)
    return groups * GROUP * ring_columns(made[1], windows) * ring_rows(windows) + copying.BEHIND


def packed(by: bool, weights: np.ndarray, windows: Windows) -> np.ndarray:
    """Weights int8 [rows, columns, channels] by groups: [groups, rows, columns, GROUP].

    Args:
        by: for the kernel of short windows.
    """
    if by:
        return planes_of.packed(weights, windows.dilations)
    rows, columns, channels = weights.shape
    whole = np.pad(weights, ((0, 0), (0, 0), (0, -channels % GROUP)))
    groups = whole.reshape(rows, columns, -1, GROUP).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(groups)


def _fill_row(
    to: Any, image: Any, channels: Any, repeat: Any, columns: Any, left: Any, wide: Any,
    outside: Any,
) -> None:  # fmt: skip
    """A row of the ring: `left` pixels of nothing, then those of the image, `wide` in all.

    Args:
        channels: of the ring; `repeat` neighbours are the same one of the image.
    """
    if columns > wide - left:
        columns = wide - left
    channel = int32(0)
    while channel < channels:
        at, end, source = to, ptr_to_int(to + 4 * left), image + channel
        while ptr_to_int(at) != end:
            put_i32(at, outside)
            at = at + 4
        end = ptr_to_int(at + 4 * columns)
        if repeat == 1:
            while ptr_to_int(at) != end:
                put_i32(at, get_u32(source))
                at, source = at + 4, source + channels
        else:
            _repeated(at, end, image, channel, channels, repeat)
            at = at + 4 * columns
        end = ptr_to_int(to + 4 * wide)
        while ptr_to_int(at) != end:
            put_i32(at, outside)
            at = at + 4
        to, channel = at, channel + 4


def _repeated(at: Any, end: Any, image: Any, channel: Any, channels: Any, repeat: Any) -> None:
    """A group of channels from `channel` on, of which there may be fewer."""
    read, first = int32(0), int32(0)  # of the image, and the first that repeats it
    while first + repeat <= channel:
        read, first = read + 1, first + repeat
    all_read, lane = read, int32(0)
    while first < channels:
        all_read, first = all_read + 1, first + repeat
    first = (read - all_read) * repeat + first
    while lane < 4 and channel + lane < channels:
        if channel + lane == first + repeat:
            read, first = read + 1, first + repeat
        to, source = at + lane, image + read
        while ptr_to_int(to) < end:
            put_u8(to, get_u8(source))
            to, source = to + 4, source + all_read
        lane = lane + 1


def _build(target: Target) -> KernelFunction:
    lanes = lanes_of(target)

    def some_taps(
        pixels: int, x: Any, w: Any, across: Any, apart: Any, n: Any, s0: Any, s1: Any, s2: Any,
        s3: Any,
    ) -> Any:  # fmt: skip
        """A row of taps of 1 or 4 neighbours, which are `apart` bytes apart."""
        while n > 0:
            v = load_i8_i32(w, 1, 0)
            s0 = s0 + v * load_i8_i32(x, 1, 0)
            if pixels == 4:
                s1 = s1 + v * load_i8_i32(x + apart, 1, 0)
                s2 = s2 + v * load_i8_i32(x + 2 * apart, 1, 0)
                s3 = s3 + v * load_i8_i32(x + 3 * apart, 1, 0)
            x, w, n = x + across, w + 4, n - 1
        return s0, s1, s2, s3

    def three_taps(
        pixels: int, step: int, x: Any, w: Any, s0: Any, s1: Any, s2: Any, s3: Any
    ) -> Any:
        """The same of 3, whose places are known: LLVM loads each code once."""
        u, v = load_i8_i32(w, 1, 0), load_i8_i32(w + 4, 1, 0)
        t = load_i8_i32(w + 8, 1, 0)
        s0 = s0 + u * load_i8_i32(x, 1, 0) + v * load_i8_i32(x + 4, 1, 0)
        s0 = s0 + t * load_i8_i32(x + 8, 1, 0)
        if pixels == 4:
            a = x + 4 * step
            s1 = s1 + u * load_i8_i32(a, 1, 0) + v * load_i8_i32(a + 4, 1, 0)
            s1 = s1 + t * load_i8_i32(a + 8, 1, 0)
            a = x + 8 * step
            s2 = s2 + u * load_i8_i32(a, 1, 0) + v * load_i8_i32(a + 4, 1, 0)
            s2 = s2 + t * load_i8_i32(a + 8, 1, 0)
            a = x + 12 * step
            s3 = s3 + u * load_i8_i32(a, 1, 0) + v * load_i8_i32(a + 4, 1, 0)
            s3 = s3 + t * load_i8_i32(a + 8, 1, 0)
        return s0, s1, s2, s3

    def put(
        to: Any, sums: Any, multipliers: Any, downs: Any, zero: Any, low: Any, high: Any,
        count: Any, room: Any,
    ) -> None:  # fmt: skip
        codes = requantised(sums, multipliers, downs, zero, low, high)
        if count >= lanes:
            store_i8(to, codes, 0)
        else:
            store_first(to, codes, count, room)

    def block(
        pixels: int, step: int, x: Any, ring: Any, ring_end: Any, row: Any, w: Any, taps: Any,
        across_taps: Any, down: Any, across: Any, apart: Any, start: Any, ups: Any,
        multipliers: Any, downs: Any, zero: Any, low: Any, high: Any, to: Any, channels: Any,
        count: Any, room: Any,
    ) -> None:  # fmt: skip
        """1 or 4 pixels of a vector's channels; `step` of windows of 3 columns, else 0."""
        s0, s1, s2, s3 = start, start, start, start
        while taps > 0:
            if step:
                s0, s1, s2, s3 = three_taps(pixels, step, x, w, s0, s1, s2, s3)
            else:
                s0, s1, s2, s3 = some_taps(pixels, x, w, across, apart, across_taps, s0, s1, s2, s3)
            w, x, taps = w + 4 * across_taps, x + down * row, taps - 1
            if ptr_to_int(x) >= ptr_to_int(ring_end):
                x = x + -(ptr_to_int(ring_end) - ptr_to_int(ring))
        if ptr_to_int(ups) != 0:
            up = load_i32(ups, 1, 0)
            s0, s1, s2, s3 = shl_by(s0, up), shl_by(s1, up), shl_by(s2, up), shl_by(s3, up)
        put(to, s0, multipliers, downs, zero, low, high, count, room)
        if pixels == 4:
            put(to + channels, s1, multipliers, downs, zero, low, high, count, room)
            put(to + 2 * channels, s2, multipliers, downs, zero, low, high, count, room)
            put(to + 3 * channels, s3, multipliers, downs, zero, low, high, count, room)

    def line(
        step: int, pixels: Any, x: Any, ring: Any, ring_end: Any, row: Any, w: Any, taps: Any,
        across_taps: Any, down: Any, across: Any, apart: Any, start: Any, ups: Any,
        multipliers: Any, downs: Any, zero: Any, low: Any, high: Any, to: Any, channels: Any,
        count: Any, room: Any,
    ) -> None:  # fmt: skip
        """A row of a vector's channels."""
        while pixels >= 4:
            block(4, step, x, ring, ring_end, row, w, taps, across_taps, down, across, apart,
                  start, ups, multipliers, downs, zero, low, high, to, channels, count,
                  room)  # fmt: skip
            x, to, pixels = x + 4 * apart, to + 4 * channels, pixels - 4
        while pixels > 0:
            block(1, step, x, ring, ring_end, row, w, taps, across_taps, down, across, apart,
                  start, ups, multipliers, downs, zero, low, high, to, channels, count,
                  room)  # fmt: skip
            x, to, pixels = x + apart, to + channels, pixels - 1

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        image, weights, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
        bias, multipliers, downs = arg_ptr(args, 3), arg_ptr(args, 4), arg_ptr(args, 5)
        ups, ring = arg_ptr(args, 6), arg_ptr(args, 7)
        ring_rows, wide = int32(arg_int(args, 8)), int32(arg_int(args, 9))
        repeat = int32(arg_int(args, 10))
        rows, columns = int32(arg_int(args, 11)), int32(arg_int(args, 12))
        made_rows, made_columns = int32(arg_int(args, 14)), int32(arg_int(args, 15))
        taps, across_taps = int32(arg_int(args, 16)), int32(arg_int(args, 17))
        step_down, step_across = int32(arg_int(args, 18)), int32(arg_int(args, 19))
        y, left = int32(arg_int(args, 20)), -int32(arg_int(args, 21))
        down, across = int32(arg_int(args, 22)), 4 * int32(arg_int(args, 23))
        outside = arg_int(args, 24)
        zero, low, high = (
            splat_i32(arg_int(args, 25)), splat_i32(arg_int(args, 26)),
            splat_i32(arg_int(args, 27)),
        )  # fmt: skip
        read_row = columns * int32(arg_int(args, 13))
        channels = int32(arg_int(args, 13)) * repeat
        group_bytes = 4 * wide
        row = ((channels + 3) >> 2) * group_bytes
        ring_end = ring + ring_rows * row
        room = ring_end
        apart = 4 * step_across
        # Where rows y and the next one that is not there yet are in the ring.
        first, next_at, next_y = ring, ring, y
        while made_rows > 0:
            while next_y < y + ring_rows:
                if next_y >= y:
                    if next_y < 0 or next_y >= rows:
                        _fill_row(next_at, image, channels, repeat, int32(0), left, wide,
                                  outside)  # fmt: skip
                    else:
                        _fill_row(next_at, image + next_y * read_row, channels, repeat, columns,
                                  left, wide, outside)  # fmt: skip
                next_y, next_at = next_y + 1, next_at + row
                if ptr_to_int(next_at) == ptr_to_int(ring_end):
                    next_at = ring
            channel = int32(0)
            while channel < channels:
                group = channel >> 2
                w = weights + (group * (4 * taps * across_taps) + (channel & 3))
                x = first + (group * group_bytes + (channel & 3))
                to, pixels, count = c + channel, made_columns, channels - channel
                of = 4 * channel
                start = load_i32(bias + of, 1, 0)
                upper = ups
                if ptr_to_int(ups) != 0:
                    upper = ups + of
                if across_taps == 3 and across == 4 and step_across == 1:
                    line(1, pixels, x, ring, ring_end, row, w, taps, across_taps, down, across,
                         apart, start, upper, multipliers + of, downs + of, zero, low, high, to,
                         channels, count, room)  # fmt: skip
                elif across_taps == 3 and across == 4 and step_across == 2:
                    line(2, pixels, x, ring, ring_end, row, w, taps, across_taps, down, across,
                         apart, start, upper, multipliers + of, downs + of, zero, low, high, to,
                         channels, count, room)  # fmt: skip
                else:
                    line(0, pixels, x, ring, ring_end, row, w, taps, across_taps, down, across,
                         apart, start, upper, multipliers + of, downs + of, zero, low, high, to,
                         channels, count, room)  # fmt: skip
                channel = channel + lanes
            c, y, made_rows = c + made_columns * channels, y + step_down, made_rows - 1
            first = first + step_down * row
            while ptr_to_int(first) >= ptr_to_int(ring_end):
                first = first + -(ring_rows * row)

    return with_lanes(kernel, lanes)


_CASES = (  # rows, columns, channels, repeat, windows
    (6, 7, 5, 1, Windows((3, 3), (1, 1), (1, 1))),
    (7, 11, 8, 1, Windows((3, 3), (2, 2), (1, 1))),
    (5, 6, 4, 1, Windows((2, 4), (1, 3), (0, 2), (2, 1))),
    (4, 5, 3, 2, Windows((3, 2), (3, 1), (1, 0))),
)


def slots_of(
    by: bool, read: tuple[int, int, int], made: tuple[int, int, int], windows: Windows, outside: int
) -> tuple[list[int], int]:
    """Slots from 8 on but for the ends of codes, and bytes of scratch.

    Args:
        by: of the kernel of short windows.
        outside: the code of zero.
    """
    rows, wide = ring_rows(windows), ring_columns(made[1], windows)
    if not by:
        before = [rows, wide, made[2] // read[2]]
        return [*before, *geometry(read, made, windows, outside)], scratch_bytes(made, windows)
    across = ring_columns(1, windows)
    plane = planes_of.plane_bytes((rows, across), wide)
    slots = [
        rows, plane, *read, *made[:2], *windows.strides, -windows.pads[0], -windows.pads[1],
        copying.four_times(outside), min(read[1], wide - windows.pads[1]), across,
    ]  # fmt: skip
    planes = -(-made[2] // GROUP) * GROUP * plane
    # Chips without vectors keep the sums of a row.
    return slots, planes + 4 * made[1] + copying.BEHIND


def _cases(by: bool, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for rows, columns, channels, repeat, windows in _CASES:
        made = (made_size(rows, windows, 0), made_size(columns, windows, 1), channels * repeat)
        read = (rows, columns, channels)
        if by and not fits(target, windows, read, made):
            continue
        for kind, ends in ENDS.items():
            room = rng.integers(-128, 128, rows * columns * channels + copying.BEHIND)
            codes = room.astype(np.int8)
            image = codes[: -copying.BEHIND].reshape(read)
            m = made[2]
            weights = rng.integers(-127, 128, (*windows.taps, m)).astype(np.int8)
            bias, multipliers, shifts = scales_for(rng, kind, 9, m)
            seen = windows_of(image, windows, made[:2], 5).repeat(repeat, axis=-1)
            sums = np.einsum("abijc,ijc->abc", seen, weights.astype(np.int64)) + bias
            found = multiplied(sums, multipliers, shifts) + ends[0]
            expected = np.clip(found, *ends[1:]).astype(np.int8)
            c = np.zeros(made, np.int8)
            reach = reach_of(weights.reshape(-1, m).T, bias)
            factors, downs, ups = scaling_of(multipliers, shifts, ends, reach, target)
            after, scratch = slots_of(by, read, made, windows, 5)
            slots: list[Any] = [
                codes, packed(by, weights, windows), c, by_lanes(bias, target), factors, downs,
                0 if ups is None else ups, np.zeros(scratch, np.uint8), *after, *ends,
            ]  # fmt: skip
            label = f"{rows}x{columns}x{channels} {windows.taps} {kind}"
            yield Case(slots, [(c, expected)], 0, label)
            if c.size <= image.size and repeat == 1:
                over = codes.copy()
                slots = [over, slots[1], over, *slots[3:]]
                made_there = np.concatenate([expected.reshape(-1), codes[c.size :]])
                yield Case(slots, [(over, made_there)], 0, f"{label} in place")


def all_kernels() -> list[Kernel]:
    """One for all windows, and one for short ones."""
    own = (__name__, copying.__name__, lanes_of.__module__)
    windows = (
        *own, planes_of.__name__, depthwise_i8_windows.__name__,
        depthwise_i8_pairs.__name__,
    )  # fmt: skip
    return [
        Kernel(NAME, _build, own, lambda target, rng: _cases(False, target, rng)),
        Kernel(WINDOWS, _build_windows, windows, lambda target, rng: _cases(True, target, rng)),
    ]
