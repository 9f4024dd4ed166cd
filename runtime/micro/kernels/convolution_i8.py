"""Convolutions of images of int8 codes: windows of some pixels become rows of a product.

An image lies pixel by pixel. What the windows of some neighbours see is copied to a
buffer, row of taps by row of taps, with the code of zero where a window is outside of the image;
then these rows are multiplied by all weights. Source: Lai et al., "CMSIS-NN" (1801.06601), section
3.3: partial im2col.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.micro.kernels import copying, matmul_i8
from headrace.micro.kernels.matmul_i8 import reference, scales_for
from headrace.micro.kernels.product_i8 import product_of
from headrace.micro.kernels.requantise import reach_of
from headrace.micro.network import Windows
from headrace.micro.windows import windows_of
from headrace.targets.simd import arg_int, arg_ptr, int32, splat_i32, with_lanes
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME = "convolution_i8"


def windows_bytes(target: Target, k: int) -> int:
    """Of the buffer for windows of k codes."""
    of = product_of(target)
    return -(-(of.rows * of.whole(k) + copying.BEHIND) // 16) * 16


def scratch_bytes(target: Target, k: int, m: int) -> int:
    """Of windows and sums of a convolution with m x k weights."""
    of = product_of(target)
    return windows_bytes(target, k) + of.scratch_bytes(k, m, of.rows)


def _build(target: Target) -> KernelFunction:
    of = product_of(target)
    lanes, most, multiply = of.lanes, of.rows, of.multiply
    copy, fill = copying.copy_of(lanes), copying.fill_of(lanes)

    def gather(
        to: Any, image: Any, y: Any, x: Any, rows: Any, columns: Any, channels: Any, taps: Any,
        tap_columns: Any, down: Any, across: Any, outside: Any,
    ) -> None:  # fmt: skip
        """What a window that begins at row y and column x sees."""
        row_bytes = columns * channels
        span = tap_columns * channels
        while taps > 0:
            if y < 0 or y >= rows:
                fill(to, outside, span)
                to = to + span
            elif across == 1 and x >= 0 and x + tap_columns <= columns:
                copy(to, image + (y * row_bytes + x * channels), span)
                to = to + span
            else:
                tap, at = tap_columns, x
                while tap > 0:
                    if at < 0 or at >= columns:
                        fill(to, outside, channels)
                    else:
                        copy(to, image + (y * row_bytes + at * channels), channels)
                    to, at, tap = to + channels, at + across, tap - 1
            y, taps = y + down, taps - 1

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        image, stream, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
        multipliers, downs, ups = arg_ptr(args, 3), arg_ptr(args, 4), arg_ptr(args, 5)
        buffer, scratch = arg_ptr(args, 6), arg_ptr(args, 7)
        k, m = int32(arg_int(args, 8)), int32(arg_int(args, 9))
        rows, columns, channels = (
            int32(arg_int(args, 10)), int32(arg_int(args, 11)), int32(arg_int(args, 12))
        )  # fmt: skip
        made_rows, made_columns = int32(arg_int(args, 13)), int32(arg_int(args, 14))
        taps, tap_columns = int32(arg_int(args, 15)), int32(arg_int(args, 16))
        step_down, step_across = int32(arg_int(args, 17)), int32(arg_int(args, 18))
        y, left = int32(arg_int(args, 19)), int32(arg_int(args, 20))
        down, across = int32(arg_int(args, 21)), int32(arg_int(args, 22))
        outside = splat_i32(arg_int(args, 23))
        zero, low, high = (
            splat_i32(arg_int(args, 24)), splat_i32(arg_int(args, 25)), splat_i32(arg_int(args, 26))
        )  # fmt: skip
        # Windows wait until there are enough of them, also from row to row.
        x, pixels, waiting, to = left, made_columns, int32(0), buffer
        while made_rows > 0:
            gather(to, image, y, x, rows, columns, channels, taps, tap_columns, down, across,
                   outside)  # fmt: skip
            to, waiting = to + k, waiting + 1
            if waiting == most:
                multiply(most, buffer, k, stream, c, m, k, m, multipliers, downs, ups, scratch,
                         zero, low, high)  # fmt: skip
                c, waiting, to = c + most * m, int32(0), buffer
            x, pixels = x + step_across, pixels - 1
            if pixels == 0:
                x, y, pixels, made_rows = left, y + step_down, made_columns, made_rows - 1
        to = buffer
        while waiting > 0:
            multiply(1, to, k, stream, c, m, k, m, multipliers, downs, ups, scratch, zero, low,
                     high)  # fmt: skip
            c, to, waiting = c + m, to + k, waiting - 1

    return with_lanes(kernel, lanes)


def geometry(
    image: tuple[int, int, int], made: tuple[int, int, int], windows: Windows, zero: int
) -> list[int]:
    """Slots of shapes [rows, columns, channels] and windows; `zero` is the code of what is outside.

    The first window begins at the negative pads.
    """
    return [
        *image, *made[:2], *windows.taps, *windows.strides, -windows.pads[0], -windows.pads[1],
        *windows.dilations, copying.four_times(zero),
    ]  # fmt: skip


_CASES = (  # rows, columns, channels, made channels, windows
    (5, 6, 3, 5, Windows((3, 3), (1, 1), (1, 1))),
    (7, 5, 16, 4, Windows((3, 2), (2, 2), (0, 1))),
    (4, 5, 1, 8, Windows((4, 3), (2, 2), (1, 1))),
    (6, 6, 4, 9, Windows((2, 3), (1, 1), (1, 2), (2, 2))),
    (3, 5, 20, 6, Windows((1, 1), (2, 2))),
)


def made_size(length: int, windows: Windows, axis: int) -> int:
    """Rows or columns that a convolution of the tests makes, with pads on both sides."""
    reach = (windows.taps[axis] - 1) * windows.dilations[axis] + 1
    return (length + 2 * windows.pads[axis] - reach) // windows.strides[axis] + 1


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for rows, columns, channels, m, windows in _CASES:
        for kind, ends in matmul_i8.ENDS.items():
            room = rng.integers(-128, 128, rows * columns * channels + copying.BEHIND)
            codes = room.astype(np.int8)
            image = codes[: -copying.BEHIND].reshape(rows, columns, channels)
            k = windows.taps[0] * windows.taps[1] * channels
            b = rng.integers(-127, 128, (m, k)).astype(np.int8)
            bias, multipliers, shifts = scales_for(rng, kind, k, m)
            made = (made_size(rows, windows, 0), made_size(columns, windows, 1), m)
            seen = windows_of(image, windows, made[:2], 5).reshape(-1, k)
            expected = reference(seen, b, bias, multipliers, shifts, *ends).reshape(made)
            c = np.zeros(made, np.int8)
            order = product_of(target).order(m)
            factors, downs, ups = matmul_i8.scaling_of(
                multipliers[order], shifts[order], ends, reach_of(b, bias), target
            )
            scratch, of = np.zeros(scratch_bytes(target, k, m), np.uint8), product_of(target)
            slots = [
                codes, of.packed(b, bias), c, factors, downs, 0 if ups is None else ups, scratch,
                scratch[windows_bytes(target, k) :], of.whole(k), m,
                *geometry(image.shape, made, windows, 5), *ends,
            ]  # fmt: skip
            label = f"{rows}x{columns}x{channels} to {m}, {windows.taps} {kind}"
            yield Case(slots, [(c, expected)], 0, label)


def all_kernels() -> list[Kernel]:
    """One convolution of any windows."""
    sources = (__name__, *matmul_i8.SOURCES, copying.__name__)
    return [Kernel(NAME, _build, sources, _cases)]
