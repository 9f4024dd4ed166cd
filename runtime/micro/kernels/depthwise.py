"""Convolutions of each channel for itself.

Images have their pads (`pad`), so that no window leaves them. A vector holds neighbouring channels
of a pixel. Each sum begins at `start`, and takes its products in the order of the taps, line by
line. Where there are fewer channels than a vector has, elements are stored one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.numbers import (
    KINDS,
    UNBOUNDED,
    Kind,
    Numbers,
    bounded,
    dtype_of,
    numbers_of,
    some_not_finite,
)
from headrace.micro.network import Windows
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    fma,
    get_f32,
    get_i32,
    int_to_ptr,
    larger,
    maximum,
    minimum,
    ptr_to_int,
    repeat,
    stack_bytes,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAMES: dict[Kind, str] = {kind: f"depthwise_{kind}" for kind in KINDS}
STACK = 128


def _forward(numbers: Numbers) -> KernelFunction:
    load, store, splat = numbers.load, numbers.store, numbers.splat
    get, put_one, size, lanes = numbers.get, numbers.put, numbers.bytes, numbers.lanes
    width = lanes * size

    def line_of_3(pixels: int, a: Any, b: Any, c: Any, d: Any, x: Any, pixel: Any, w: Any,
                  w_tap: Any) -> tuple[Any, Any, Any, Any]:  # fmt: skip
        """3 taps of neighbours: a pixel that several of 1, 2 or 4 sums see is loaded once."""
        first = load(w, 1, 0)
        w = w + w_tap
        second = load(w, 1, 0)
        third = load(w + w_tap, 1, 0)
        v = load(x, 1, 0)
        a, x = fma(v, first, a), x + pixel
        v = load(x, 1, 0)
        a, x = fma(v, second, a), x + pixel
        if pixels > 1:
            b = fma(v, first, b)
        v = load(x, 1, 0)
        a, x = fma(v, third, a), x + pixel
        if pixels > 1:
            b = fma(v, second, b)
            if pixels > 2:
                c = fma(v, first, c)
            v = load(x, 1, 0)
            b = fma(v, third, b)
        if pixels > 2:
            c, d, x = fma(v, second, c), fma(v, first, d), x + pixel
            v = load(x, 1, 0)
            c, d, x = fma(v, third, c), fma(v, second, d), x + pixel
            d = fma(load(x, 1, 0), third, d)
        return a, b, c, d

    def bounds_of(o: Any) -> tuple[Any, Any]:
        return splat(get_f32(o + 8 * 18)), splat(get_f32(o + 8 * 19))

    def near_block(
        pixels: int, o: Any, x: Any, pixel: Any, w: Any, start: Any, to: Any, to_pixel: Any
    ) -> None:
        """`block`, where windows of 3 taps are one pixel apart."""
        a = load(start, 1, 0)
        b, c, d = a, a, a
        x_line, w_tap, w_line = arg_int(o, 10), arg_int(o, 11), arg_int(o, 12)
        line = o + arg_int(o, 7)
        while ptr_to_int(line) != ptr_to_int(o):
            a, b, c, d = line_of_3(pixels, a, b, c, d, x, pixel, w, w_tap)
            x, w, line = x + x_line, w + w_line, line + -1
        if get_i32(o + 8 * 17) != 0:
            low, high = bounds_of(o)
            a = minimum(high, maximum(a, low))
            if pixels > 1:
                b = minimum(high, maximum(b, low))
            if pixels > 2:
                c, d = minimum(high, maximum(c, low)), minimum(high, maximum(d, low))
        store(to, a, 0)
        if pixels > 1:
            store(to + to_pixel, b, 0)
        if pixels > 2:
            store(to + 2 * to_pixel, c, 0)
            store(to + 3 * to_pixel, d, 0)

    def block(
        pixels: int, o: Any, x: Any, pixel: Any, w: Any, start: Any, c: Any, c_pixel: Any
    ) -> None:
        """A vector of channels of some pixels; counters are addresses as in `matmul`."""
        sums = repeat(load(start, 1, 0), pixels)
        x_tap, x_line = arg_int(o, 9), arg_int(o, 10)
        w_tap, w_line = arg_int(o, 11), arg_int(o, 12)
        line = o + arg_int(o, 7)
        while ptr_to_int(line) != ptr_to_int(o):
            tap, at, weights = o + arg_int(o, 8), x, w
            while ptr_to_int(tap) != ptr_to_int(o):
                sums = fma(load(at, pixels, pixel), load(weights, 1, 0), sums)
                at, weights, tap = at + x_tap, weights + w_tap, tap + -1
            x, w, line = x + x_line, w + w_line, line + -1
        if get_i32(o + 8 * 17) != 0:
            low, high = bounds_of(o)
            sums = minimum(high, maximum(sums, low))
        store(c, sums, c_pixel)

    def some(
        pixels: int, o: Any, n: Any, x: Any, pixel: Any, w: Any, start: Any, c: Any, c_pixel: Any
    ) -> None:
        """All channels of some pixels."""
        left = o + n
        while ptr_to_int(left) != ptr_to_int(o):
            to, apart = c, c_pixel
            if ptr_to_int(left) < ptr_to_int(o + lanes):
                if n < lanes:
                    to, apart = stack_bytes(STACK), width
                else:
                    back = (ptr_to_int(left) - ptr_to_int(o + lanes)) * size
                    x, w, start, to = x + back, w + back, start + back, to + back
            if arg_int(o, 8) == 3 and arg_int(o, 9) == pixel:
                near_block(pixels, o, x, pixel, w, start, to, apart)
            else:
                block(pixels, o, x, pixel, w, start, to, apart)
            if n < lanes:
                for i in range(pixels):
                    for j in range(n):
                        put_one(c + (i * c_pixel + j * size), get(to + (i * width + j * size)))
            x, w, start, c = x + width, w + width, start + width, c + width
            left = int_to_ptr(larger(ptr_to_int(left + -lanes), ptr_to_int(o)))

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        o = args
        x, w, start, c = arg_ptr(o, 0), arg_ptr(o, 1), arg_ptr(o, 2), arg_ptr(o, 3)
        n, pixel, c_pixel = arg_int(o, 6), arg_int(o, 13), arg_int(o, 15)
        row = o + arg_int(o, 4)
        while ptr_to_int(row) != ptr_to_int(o):
            at, to, left = x, c, o + arg_int(o, 5)
            while ptr_to_int(left) >= ptr_to_int(o + 4):
                some(4, o, n, at, pixel, w, start, to, c_pixel)
                at, to, left = at + 4 * pixel, to + 4 * c_pixel, left + -4
            if ptr_to_int(left) >= ptr_to_int(o + 2):
                some(2, o, n, at, pixel, w, start, to, c_pixel)
                at, to, left = at + 2 * pixel, to + 2 * c_pixel, left + -2
            if ptr_to_int(left) != ptr_to_int(o):
                some(1, o, n, at, pixel, w, start, to, c_pixel)
            x, c, row = x + arg_int(o, 14), c + arg_int(o, 16), row + -1

    return with_lanes(kernel, lanes)


@dataclass(frozen=True)
class Convolved:
    """A convolution's addresses and shape; distances in bytes.

    Attributes:
        x, w, start, c: addresses.
        rows, columns, channels: of c.
        lines, taps: of windows.
        x_tap, x_line, w_tap, w_line: from tap to tap, and from line to line of them.
        x_pixel, x_row, c_pixel, c_row: from window to window.
        bounds: of c.
    """

    x: Any
    w: Any
    start: Any
    c: Any
    rows: int
    columns: int
    channels: int
    lines: int
    taps: int
    x_tap: int
    x_line: int
    w_tap: int
    w_line: int
    x_pixel: int
    x_row: int
    c_pixel: int
    c_row: int
    bounds: tuple[float, float] = UNBOUNDED

    @property
    def turned(self) -> Convolved:
        """The same with rows and columns exchanged, of windows and of taps."""
        return replace(
            self, rows=self.columns, columns=self.rows, lines=self.taps, taps=self.lines,
            x_tap=self.x_line, x_line=self.x_tap, w_tap=self.w_line, w_line=self.w_tap,
            x_pixel=self.x_row, x_row=self.x_pixel, c_pixel=self.c_row, c_row=self.c_pixel,
        )  # fmt: skip

    @property
    def slots(self) -> tuple[Any, ...]:
        """The argument block."""
        *shape, bounds = (getattr(self, one.name) for one in fields(self))
        return *shape, int(bounds != UNBOUNDED), float(bounds[0]), float(bounds[1])


def windows_of(x: np.ndarray, windows: Windows, rows: int, columns: int) -> np.ndarray:
    """What windows see of an image [rows, columns, channels] that has its pads.

    Returns:
        a view [rows, columns, tap lines, taps, channels].
    """
    (lines, taps), (down, across) = windows.taps, windows.strides
    (further, aside), (row, pixel, channel) = windows.dilations, x.strides
    return np.lib.stride_tricks.as_strided(
        x, (rows, columns, lines, taps, x.shape[2]),
        (down * row, across * pixel, further * row, aside * pixel, channel), writeable=False,
    )  # fmt: skip


def reference(
    numbers: Numbers, seen: np.ndarray, w: np.ndarray, start: np.ndarray,
    bounds: tuple[float, float] = UNBOUNDED,
) -> np.ndarray:  # fmt: skip
    """What a chip makes of `windows_of` an image and weights [tap lines, taps, channels]."""
    of = numbers.arithmetic
    sums = np.broadcast_to(of.operand(start), (*seen.shape[:2], seen.shape[-1]))
    for line, tap in np.ndindex(w.shape[:2]):
        sums = of.fma(seen[:, :, line, tap], w[line, tap], sums)
    return numbers.stored(bounded(numbers, sums, bounds))


_SHAPES = (
    ((3, 3), (1, 1), (4, 5, 9)),
    ((2, 3), (1, 1), (2, 11, 8)),
    ((3, 3), (2, 2), (3, 7, 16)),
    ((2, 4), (1, 2), (2, 3, 3)),
)


def images(
    kind: Kind, rng: np.random.Generator
) -> Iterator[tuple[Windows, np.ndarray, np.ndarray, tuple[int, int, int]]]:
    """Of tests: windows, an image with pads, what they see of it, and the made shape."""
    for taps, strides, (rows, columns, n) in _SHAPES:
        windows = Windows(taps, strides)
        high = (rows - 1) * strides[0] + taps[0]
        wide = (columns - 1) * strides[1] + taps[1]
        x = rng.standard_normal((high, wide, n)).astype(dtype_of(kind))
        yield windows, x, windows_of(x, windows, rows, columns), (rows, columns, n)


def _cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    numbers, dtype = numbers_of(target, kind), dtype_of(kind)
    for bounds in (UNBOUNDED, (0.0, 6.0)):
        for windows, x, seen, (rows, columns, n) in images(kind, rng):
            w = rng.standard_normal((*windows.taps, n)).astype(dtype)
            start = rng.standard_normal(n).astype(dtype)
            if bounds != UNBOUNDED:
                some_not_finite(rng, x, start)
            c = np.zeros((rows, columns, n), dtype)
            block = Convolved(
                x, w, start, c, rows, columns, n, *windows.taps, x.strides[1], x.strides[0],
                w.strides[1], w.strides[0], windows.strides[1] * x.strides[1],
                windows.strides[0] * x.strides[0],
                c.strides[1], c.strides[0], bounds,
            )  # fmt: skip
            expected = reference(numbers, seen, w, start, bounds)
            label = f"{windows} {c.shape} {bounds}"
            yield Case(list(block.slots), [(c, expected)], 0, label)


def _build(kind: Kind, target: Target) -> KernelFunction:
    return _forward(numbers_of(target, kind))


def all_kernels() -> list[Kernel]:
    """One for each kind of number."""
    return [
        Kernel(
            name, partial(_build, kind), (__name__, numbers_of.__module__), partial(_cases, kind)
        )
        for kind, name in NAMES.items()
    ]
