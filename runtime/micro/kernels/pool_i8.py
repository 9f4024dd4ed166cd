"""The mean and the most of windows of int8 codes; see `headrace.micro.int8.pool`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from headrace.micro.fixed_point import doubling_high as exact_high
from headrace.micro.fixed_point import rounding_shift as exact_shift
from headrace.micro.kernels.convolution_i8 import made_size
from headrace.micro.kernels.copying import BEHIND
from headrace.micro.kernels.requantise import lanes_of, store_first, within
from headrace.micro.network import Windows
from headrace.micro.windows import windows_of
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_i32,
    doubling_high,
    int32,
    load_i8_i32,
    most_i32,
    rounding_shift,
    shl_by,
    splat_i32,
    store_i8,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

MEAN, MOST = "pool_mean_i8", "pool_most_i8"
SCRATCH_BYTES = 16


def _build(kind: Literal["mean", "most"], target: Target) -> KernelFunction:
    lanes = lanes_of(target)

    def joined(found: Any, at: Any) -> Any:
        codes = load_i8_i32(at, 1, 0)
        return found + codes if kind == "mean" else most_i32(found, codes)

    def window(
        vectors: int, corner: Any, rows: Any, columns: Any, row_bytes: Any, channels: Any,
        start: Any,
    ) -> Any:  # fmt: skip
        """1 or 4 vectors of what is in a window, in 4 of them."""
        f0, f1, f2, f3 = start, start, start, start
        while rows > 0:
            at, pixels = corner, columns
            while pixels > 0:
                f0 = joined(f0, at)
                if vectors == 4:
                    f1, f2 = joined(f1, at + lanes), joined(f2, at + 2 * lanes)
                    f3 = joined(f3, at + 3 * lanes)
                at, pixels = at + channels, pixels - 1
            corner, rows = corner + row_bytes, rows - 1
        return f0, f1, f2, f3

    def code(found: Any, by: Any, up: Any, down: Any, zero: Any, low: Any, high: Any) -> Any:
        if kind == "mean":
            found = rounding_shift(doubling_high(shl_by(found, up), by), down) + zero
        return within(found, low, high)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        image, c, room = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
        rows, columns, channels = (
            int32(arg_int(args, 3)), int32(arg_int(args, 4)), int32(arg_int(args, 5))
        )  # fmt: skip
        made_rows, made_columns = int32(arg_int(args, 6)), int32(arg_int(args, 7))
        taps, across_taps = int32(arg_int(args, 8)), int32(arg_int(args, 9))
        step_down, step_across = int32(arg_int(args, 10)), int32(arg_int(args, 11))
        y, left = int32(arg_int(args, 12)), int32(arg_int(args, 13))
        low, high = splat_i32(arg_int(args, 14)), splat_i32(arg_int(args, 15))
        multipliers, start, up = room, splat_i32(-128), splat_i32(0)
        down, zero = up, up
        if kind == "mean":
            multipliers = arg_ptr(args, 16)
            start, up = splat_i32(arg_int(args, 17)), splat_i32(arg_int(args, 18))
            down, zero = splat_i32(arg_int(args, 19)), splat_i32(arg_int(args, 20))
        while made_rows > 0:
            top, bottom = y, y + taps
            if top < 0:
                top = int32(0)
            if bottom > rows:
                bottom = rows
            x, pixels = left, made_columns
            while pixels > 0:
                first, last = x, x + across_taps
                if first < 0:
                    first = int32(0)
                if last > columns:
                    last = columns
                corner = image + (top * columns + first) * channels
                count = (bottom - top) * (last - first)
                of = channels
                by = splat_i32(0)
                if kind == "mean":
                    by = bcast_i32(multipliers + 4 * count, 1, 0)
                while of >= 4 * lanes:
                    f0, f1, f2, f3 = window(4, corner, bottom - top, last - first,
                                            columns * channels, channels, start)  # fmt: skip
                    store_i8(c, code(f0, by, up, down, zero, low, high), 0)
                    store_i8(c + lanes, code(f1, by, up, down, zero, low, high), 0)
                    store_i8(c + 2 * lanes, code(f2, by, up, down, zero, low, high), 0)
                    store_i8(c + 3 * lanes, code(f3, by, up, down, zero, low, high), 0)
                    corner, c, of = corner + 4 * lanes, c + 4 * lanes, of - 4 * lanes
                while of > 0:
                    f0, f1, f2, f3 = window(1, corner, bottom - top, last - first,
                                            columns * channels, channels, start)  # fmt: skip
                    found = code(f0, by, up, down, zero, low, high)
                    if of >= lanes:
                        store_i8(c, found, 0)
                    else:
                        store_first(c, found, of, room)
                    corner, c, of = corner + lanes, c + lanes, of - lanes
                # The last vector of a pixel may have been only some of its channels.
                c = c + of
                x, pixels = x + step_across, pixels - 1
            y, made_rows = y + step_down, made_rows - 1

    return with_lanes(kernel, lanes)


def geometry(
    image: tuple[int, int, int], made: tuple[int, int, int], windows: Windows
) -> list[int]:
    """Slots of shapes [rows, columns, channels] and windows."""
    return [*image, *made[:2], *windows.taps, *windows.strides, -windows.pads[0], -windows.pads[1]]


_CASES = (  # rows, columns, channels, windows
    (6, 7, 5, Windows((2, 3), (2, 2), (0, 1))),
    (5, 5, 16, Windows((5, 5))),
    (3, 3, 21, Windows((3, 2), (1, 1), (1, 0))),
    (4, 3, 2, Windows((3, 3), (1, 1), (1, 1))),
)


def _cases(kind: Literal["mean", "most"], rng: np.random.Generator) -> Iterator[Case]:
    for rows, columns, channels, windows in _CASES:
        room = rng.integers(-128, 128, rows * columns * channels + BEHIND).astype(np.int8)
        image = room[:-BEHIND].reshape(rows, columns, channels)
        made = (made_size(rows, windows, 0), made_size(columns, windows, 1), channels)
        slots: list[Any] = [room, np.zeros(made, np.int8), np.zeros(SCRATCH_BYTES, np.int8)]
        slots += [*geometry(image.shape, made, windows), -100, 90]
        if kind == "most":
            expected = windows_of(image, windows, made[:2], -128).max((2, 3))
        else:
            taps = windows.taps[0] * windows.taps[1]
            multipliers = rng.integers(2**30 // taps, 2**31 // taps, taps + 1).astype(np.int32)
            start, up, down, zero = int(rng.integers(-99, 99)), 1, 2, -3
            sums = windows_of(image, windows, made[:2], 0).sum((2, 3)) + start
            there = windows_of(np.ones_like(image), windows, made[:2], 0).sum((2, 3))
            expected = exact_shift(exact_high(sums << up, multipliers[there]), down) + zero
            slots += [multipliers, start, up, -down, zero]
        expected = np.clip(expected, -100, 90).astype(np.int8)
        yield Case(slots, [(slots[1], expected)], 0, f"{rows}x{columns}x{channels} {windows.taps}")


def _row(name: str, kind: Literal["mean", "most"]) -> Kernel:
    sources = (__name__, lanes_of.__module__)
    return Kernel(name, lambda t: _build(kind, t), sources, lambda t, rng: _cases(kind, rng))


def all_kernels() -> list[Kernel]:
    """Means and maxima."""
    return [_row(MEAN, "mean"), _row(MOST, "most")]
