"""Means and maxima of windows, channel by channel, and their gradients, in float32 on all chips.

Pixels of a window that are not in the image do not count. A mean adds up line by line, then
multiplies by one over the number of pixels. A maximum is NaN where a pixel is. The gradient of a
mean is added to all pixels of its window, that of a maximum to the first pixel that has it; windows
come in order, and each sum is stored before the next one is added.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    arg_float,
    arg_int,
    arg_ptr,
    larger,
    maximum,
    minimum,
    select_lt,
    select_nan,
    smaller,
    splat_f32,
    splat_i32,
    stack_bytes,
    to_f32,
    with_lanes,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

POOLS = ("mean", "most")


def name_of(pool: str, kind: Kind, *, gradient: bool = False) -> str:
    """The kernel's."""
    return f"pool_{pool}_{'gradient_' * gradient}{kind}"


def _larger(found: Any, value: Any) -> Any:
    return select_nan(value, value, maximum(found, value))


def _kernel(numbers: Numbers, mean: bool, gradient: bool) -> KernelFunction:
    load, store, get, put = numbers.load, numbers.store, numbers.get, numbers.put
    size, lanes = numbers.bytes, numbers.lanes

    def put_some(to: Any, x: Any, n: Any) -> None:
        """The first of a vector; all if there are so many."""
        if n >= lanes:
            store(to, x, 0)
        else:
            place = stack_bytes(64)
            store(place, x, 0)
            for i in range(n):
                put(to + i * size, get(place + i * size))

    def one(x: Any, row: Any, pixel: Any, lines: Any, taps: Any) -> Any:
        """A mean without its factor, or a maximum."""
        found = load(x, 1, 0)
        if mean:
            found = zeros_f32(1)
        for i in range(lines):
            for j in range(taps):
                value = load(x + (i * row + j * pixel), 1, 0)
                found = found + value if mean else _larger(found, value)
        return found

    def spread(
        x: Any, dx: Any, y: Any, dy: Any, row: Any, pixel: Any, lines: Any, taps: Any, n: Any
    ) -> None:
        """A gradient to the pixels of its window."""
        rest, most = dy, load(y, 1, 0)
        for i in range(lines):
            for j in range(taps):
                at = i * row + j * pixel
                given = rest
                if not mean:
                    value = load(x + at, 1, 0)
                    given = select_lt(value, most, zeros_f32(1), rest)
                    rest = select_lt(value, most, rest, zeros_f32(1))
                put_some(dx + at, load(dx + at, 1, 0) + given, n)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        x, c, dx, dy = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_ptr(args, 3)
        rows, columns, n = arg_int(args, 4), arg_int(args, 5), arg_int(args, 6)
        made_rows, made_columns = arg_int(args, 7), arg_int(args, 8)
        lines, taps = arg_int(args, 9), arg_int(args, 10)
        low, high = splat_f32(arg_float(args, 15)), splat_f32(arg_float(args, 16))
        pixel = n * size
        row = columns * pixel
        for i in range(made_rows):
            top = i * arg_int(args, 11) - arg_int(args, 13)
            first, last = larger(top, 0), smaller(top + lines, rows)
            for j in range(made_columns):
                left = j * arg_int(args, 12) - arg_int(args, 14)
                begin, end = larger(left, 0), smaller(left + taps, columns)
                high_window, wide = last - first, end - begin
                part = splat_f32(1.0) / to_f32(splat_i32(high_window * wide))
                at, to = first * row + begin * pixel, (i * made_columns + j) * pixel
                for k in range(0, n, lanes):
                    # Gradients are added once: the last vector has what is left.
                    here = k * size
                    if gradient:
                        value = load(dy + (to + here), 1, 0)
                        if mean:
                            value = value * part
                        spread(x + (at + here), dx + (at + here), c + (to + here), value, row,
                               pixel, high_window, wide, n - k)  # fmt: skip
                    else:
                        found = one(x + (at + here), row, pixel, high_window, wide)
                        if mean:
                            found = found * part
                        put_some(c + (to + here), minimum(high, maximum(found, low)), n - k)

    return with_lanes(kernel, lanes)


def _windows(windows: Windows, x: np.ndarray, made: tuple[int, int]) -> Iterator[tuple[Any, Any]]:
    """(place of a made pixel, slices of its window in the image)."""
    for place in np.ndindex(made):
        begins = [
            p * s - pad for p, s, pad in zip(place, windows.strides, windows.pads, strict=True)
        ]
        yield (
            place,
            tuple(
                slice(max(begin, 0), min(begin + taps, n))
                for begin, taps, n in zip(begins, windows.taps, x.shape, strict=False)
            ),
        )


def reference(
    pool: str, numbers: Numbers, x: np.ndarray, windows: Windows, made: tuple[int, int],
    bounds: tuple[float, float] = UNBOUNDED,
) -> np.ndarray:  # fmt: skip
    """What a chip makes of an image [rows, columns, channels]."""
    of = numbers.arithmetic
    found = np.zeros((*made, x.shape[2]))
    for place, window in _windows(windows, x, made):
        pixels = of.operand(x[window]).reshape(-1, x.shape[2])
        if pool == "most":
            most = pixels[0]
            for one in pixels:
                most = np.where((most < one) | np.isnan(one), one, most)
            found[place] = most
            continue
        total = np.zeros(x.shape[2])
        for one in pixels:
            total = of.add(total, one)
        found[place] = of.multiply(total, np.float32(1) / np.float32(len(pixels)))
    return numbers.stored(bounded(numbers, found, bounds))


def gradient_reference(
    pool: str, numbers: Numbers, x: np.ndarray, y: np.ndarray, dy: np.ndarray, windows: Windows
) -> np.ndarray:
    """The gradient of an image, given that of what was made of it without bounds."""
    of = numbers.arithmetic
    dx = np.zeros(x.shape, x.dtype)
    for place, window in _windows(windows, x, dy.shape[:2]):
        part, of_window = dx[window], x[window]
        value = of.operand(dy[place])
        if pool == "mean":
            pixels = part.shape[0] * part.shape[1]
            value = of.multiply(value, np.float32(1) / np.float32(pixels))
        for at in np.ndindex(part.shape[:2]):
            given = value
            if pool == "most":
                hit = ~(of_window[at] < y[place])
                given, value = np.where(hit, value, 0.0), np.where(hit, 0.0, value)
            part[at] = numbers.stored(of.add(part[at], given))
    return dx


def slots(
    x: Any, c: Any, dx: Any, dy: Any, image: tuple[int, int, int], made: tuple[int, int],
    windows: Windows, bounds: tuple[float, float],
) -> list[Any]:  # fmt: skip
    """The argument block; dx and dy are addresses of anything where there is no gradient."""
    return [
        x, c, dx, dy, *image, *made, *windows.taps, *windows.strides, *windows.pads,
        float(bounds[0]), float(bounds[1]),
    ]  # fmt: skip


def _cases(
    pool: str, gradient: bool, kind: Kind, target: Target, rng: np.random.Generator
) -> Iterator[Case]:
    numbers, dtype = numbers_of(target, kind, wide=True), dtype_of(kind)
    for taps, strides, pads, made, image in (
        ((2, 2), (2, 2), (0, 0), (2, 3), (4, 6, 8)),
        ((3, 3), (2, 2), (1, 1), (3, 2), (5, 3, 5)),
        ((4, 2), (1, 1), (0, 0), (1, 1), (4, 2, 3)),
    ):
        windows = Windows(taps, strides, pads)
        x = (
            rng.integers(-3, 4, image).astype(dtype)
            if gradient
            else rng.standard_normal(image).astype(dtype)
        )
        bounds = UNBOUNDED if gradient else (-0.5, 1.0)
        if not gradient:
            some_not_finite(rng, x)
        made_values = reference(pool, numbers, x, windows, made, bounds)
        label = f"{image} {windows}"
        if not gradient:
            c = np.zeros_like(made_values)
            yield Case(
                slots(x, c, x, x, image, made, windows, bounds), [(c, made_values)], 0, label
            )
            continue
        dy, dx = rng.standard_normal(made_values.shape).astype(dtype), np.zeros_like(x)
        expected = gradient_reference(pool, numbers, x, made_values, dy, windows)
        block = slots(x, made_values, dx, dy, image, made, windows, bounds)
        yield Case(block, [(dx, expected)], 0, label)


def _build(pool: str, gradient: bool, kind: Kind, target: Target) -> KernelFunction:
    return _kernel(numbers_of(target, kind, wide=True), pool == "mean", gradient)


def all_kernels() -> list[Kernel]:
    """Both pools and their gradients for each kind of number."""
    return [
        Kernel(
            name_of(pool, kind, gradient=gradient),
            partial(_build, pool, gradient, kind),
            (__name__, numbers_of.__module__),
            partial(_cases, pool, gradient, kind),
        )
        for pool in POOLS
        for gradient in (False, True)
        for kind in KINDS
    ]
