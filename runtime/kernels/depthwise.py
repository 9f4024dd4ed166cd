"""Depthwise convolutions of float32 images: see `headrace.kernels.convolution`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.kernels.ending import ENDINGS, end_pixels, ended
from headrace.kernels.geometry import SHAPES, Geometry, geometry_of, reference, taps_inside
from headrace.sparse.format import TILE_ROWS
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    fma,
    larger,
    load_f32,
    load_f32_grid,
    maximum,
    minimum,
    repeat,
    smaller,
    splat_f32,
    store_f32_grid,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

_WEIGHTS = 8 << 10  # bytes of some channels' taps, which stay in the first cache


def _depthwise(target: Target) -> KernelFunction:
    """y = clamp(activation(bias + sum over taps of w x)), channel by channel.

    Slots: 0 weights [tap][channels] float32, 1 x, 2 y, 3 bias, 4 what is added late (0: nothing),
    5 channels (padded to 16), 6 unused, 7 least and 23 most value (float32) of what is not yet
    finished, 8 to 22 geometry, 24 to 33 what is done last. Threads share the rows, or, where
    pixels are few, the channels, and take some channels after the others.
    """
    most = 4 if target.vector_bytes >= 32 else 2
    # Vectors of channels, of `most` pixels and of fewer: as many sums as hide how long one takes.
    few = 2 if target.vector_bytes >= 64 else 1
    wide_few = max(1, target.vector_bytes // 16)

    def of(count: int, vectors: int) -> Any:
        def some(
            w: Any, x: Any, y: Any, bias: Any, ny: Any, nx: Any, row_step: Any, tap_step: Any,
            w_row: Any, w_tap: Any, x_step: Any, y_step: Any, least: Any, highest: Any,
        ) -> None:  # fmt: skip
            acc = repeat(load_f32(bias, vectors, 64), count)
            for ky in range(ny):
                p = x + ky * row_step
                q = w + ky * w_row
                left = nx
                while left > 0:
                    acc = fma(
                        load_f32_grid(p, count, vectors, x_step, 64),
                        repeat(load_f32(q, vectors, 64), count), acc,
                    )  # fmt: skip
                    p = p + tap_step
                    q = q + w_tap
                    left -= 1
            low = repeat(repeat(splat_f32(least), vectors), count)
            high = repeat(repeat(splat_f32(highest), vectors), count)
            store_f32_grid(y, minimum(high, maximum(acc, low)), vectors, y_step, 64)

        return some

    many, many_narrow = of(most, few), of(most, 1)
    two, two_narrow = of(2, wide_few), of(2, 1)
    one, one_narrow = of(1, wide_few), of(1, 1)

    def depthwise(args: Any, thread: Any, n_threads: Any) -> None:
        (
            images, height, width, out_height, out_width, tall, wide, step_y, step_x, above, before,
            apart_y, apart_x, pixel, out_pixel,
        ) = geometry_of(args)  # fmt: skip
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        bias = arg_ptr(args, 3)
        channels = arg_int(args, 5)
        least = arg_float(args, 7)
        highest = arg_float(args, 23)
        ends = arg_int(args, 24) != 0
        more = arg_ptr(args, 4)
        rows = images * out_height
        w_tap = channels * 4
        row_step = apart_y * width * pixel
        tap_step = apart_x * pixel
        at_once = _WEIGHTS // (tall * wide * 64 * wide_few) * wide_few * 16
        at_once = larger(at_once, wide_few * 16)
        begin = 0
        end = channels
        first = rows * thread // n_threads
        last = rows * (thread + 1) // n_threads
        if (rows * out_width + 15) // 16 < wide_few * n_threads:  # products share tiles then, too
            begin = channels // 16 * thread // n_threads * 16
            end = channels // 16 * (thread + 1) // n_threads * 16
            first = 0
            last = rows
        while begin < end:
            past = smaller(end, begin + at_once)
            for row in range(first, last):
                image = row // out_height
                iy = (row - image * out_height) * step_y - above
                ky, ny = taps_inside(iy, apart_y, tall, height)
                source = x + (image * height + iy + ky * apart_y) * width * pixel
                ox = 0
                while ox < out_width:
                    ix = ox * step_x - before
                    reached = ix + (wide - 1) * apart_x  # by the last tap
                    n = 1
                    kx = 0
                    nx = wide
                    if ix >= 0 and reached < width:
                        if out_width - ox >= most and reached + (most - 1) * step_x < width:
                            n = most
                        elif out_width - ox >= 2 and reached + step_x < width:
                            n = 2
                    else:
                        kx, nx = taps_inside(ix, apart_x, wide, width)
                    at = (ky * wide + kx) * w_tap
                    p = source + (ix + kx * apart_x) * pixel
                    to = (row * out_width + ox) * out_pixel
                    c = begin
                    while c < past:
                        given = (
                            w + (at + c * 4), p + c * 4, y + (to + c * 4), bias + c * 4, ny, nx,
                            row_step, tap_step, wide * w_tap, w_tap, step_x * pixel, out_pixel,
                            least, highest,
                        )  # fmt: skip
                        step = 16
                        if n == most:
                            if past - c >= few * 16:
                                step = few * 16
                                many(*given)
                            else:
                                many_narrow(*given)
                        elif past - c >= wide_few * 16:
                            step = wide_few * 16
                            if n == 2:
                                two(*given)
                            else:
                                one(*given)
                        elif n == 2:
                            two_narrow(*given)
                        else:
                            one_narrow(*given)
                        c += step
                    if ends:
                        pixels = row * out_width + ox
                        end_pixels(
                            args, y + (to + begin * 4),
                            more + (pixels * arg_int(args, 26) + begin * 4), n,
                            (past - begin) // 16, out_pixel,
                        )  # fmt: skip
                    ox += n
            begin = past

    return depthwise


# --- references and cases -------------------------------------------------------------------------


def _depthwise_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    wide = Geometry(1, (5, 9), (5, 9), (5, 5), pads=(2, 2))  # whose weights come in parts
    for i, (geometry, _, written) in enumerate((*SHAPES, (wide, 0, 100))):
        padded = -(-written // TILE_ROWS) * TILE_ROWS
        x = rng.standard_normal((geometry.images, *geometry.read, padded)).astype(np.float32)
        w = rng.standard_normal((*geometry.taps, padded)).astype(np.float32)
        bias = rng.standard_normal(padded).astype(np.float32)
        shape = (geometry.images, *geometry.written, padded)
        y = np.full(shape, np.nan, np.float32)
        ending = replace((*ENDINGS, ENDINGS[1])[i], more_bytes=padded * 4)
        more = rng.standard_normal(shape).astype(np.float32) if ending.late else None
        exact = reference(x, w, geometry, depthwise=True) + bias
        size = reference(np.abs(x), np.abs(w), geometry, depthwise=True) + np.abs(bias)
        bound = size * (geometry.taps[0] * geometry.taps[1] + 2) * 2.0**-24
        expected, bound = ended(exact, bound, ending, more)
        low, high = ending.bounds()
        slots = [
            w, x, y, bias, 0 if more is None else more, padded, 0, low,
            *geometry.slots(padded * 4, padded * 4), high, *ending.slots(),
        ]  # fmt: skip
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{geometry}, {padded}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (
        __name__, "headrace.sparse.format", "headrace.kernels.ending", "headrace.kernels.finishes",
        "headrace.kernels.geometry", "headrace.kernels.math",
    )  # fmt: skip
    return [Kernel("depthwise_f32", _depthwise, sources, _depthwise_cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
