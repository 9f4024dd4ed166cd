"""The gradients of weights of `depthwise`.

That of a weight begins at zero, or at what is there, and takes products in the order of the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.depthwise import STACK, images
from headrace.micro.kernels.numbers import KINDS, Kind, Numbers, dtype_of, numbers_of
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    fma,
    int_to_ptr,
    larger,
    ptr_to_int,
    stack_bytes,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAMES: dict[Kind, str] = {kind: f"depthwise_gradient_{kind}" for kind in KINDS}


def _gradient(numbers: Numbers) -> KernelFunction:
    load, store, zeros = numbers.load, numbers.store, numbers.zeros
    get, put, size, lanes = numbers.get, numbers.put, numbers.bytes, numbers.lanes
    width = lanes * size

    def near_block(o: Any, x: Any, pixel: Any, dy: Any, to: Any, to_tap: Any, stays: Any) -> None:
        """`block` of 3 taps, where windows are one pixel apart: each pixel is loaded once."""
        a, b, c = zeros(1), zeros(1), zeros(1)
        if stays != 0:
            a, b, c = load(to, 1, 0), load(to + to_tap, 1, 0), load(to + 2 * to_tap, 1, 0)
        row, dy_pixel, dy_row = arg_int(o, 11), arg_int(o, 12), arg_int(o, 13)
        line = o + arg_int(o, 3)
        while ptr_to_int(line) != ptr_to_int(o):
            left, errors, at = o + arg_int(o, 4), dy, x + pixel
            first, second = load(x, 1, 0), load(at, 1, 0)
            while ptr_to_int(left) >= ptr_to_int(o + 2):
                at = at + pixel
                third, error = load(at, 1, 0), load(errors, 1, 0)
                a, b, c = fma(first, error, a), fma(second, error, b), fma(third, error, c)
                at, errors = at + pixel, errors + dy_pixel
                first, error = load(at, 1, 0), load(errors, 1, 0)
                a, b, c = fma(second, error, a), fma(third, error, b), fma(first, error, c)
                first, second = third, first
                errors, left = errors + dy_pixel, left + -2
            if ptr_to_int(left) != ptr_to_int(o):
                error = load(errors, 1, 0)
                a, b = fma(first, error, a), fma(second, error, b)
                c = fma(load(at + pixel, 1, 0), error, c)
            x, dy, line = x + row, dy + dy_row, line + -1
        store(to, a, 0)
        store(to + to_tap, b, 0)
        store(to + 2 * to_tap, c, 0)

    def block(
        taps: int, o: Any, x: Any, x_tap: Any, dy: Any, c: Any, c_tap: Any, stays: Any
    ) -> None:
        """A vector of channels of some taps of a line."""
        sums = load(c, taps, c_tap) if stays != 0 else zeros(taps)
        pixel, row = arg_int(o, 10), arg_int(o, 11)
        dy_pixel, dy_row = arg_int(o, 12), arg_int(o, 13)
        line = o + arg_int(o, 3)
        while ptr_to_int(line) != ptr_to_int(o):
            left, at, errors = o + arg_int(o, 4), x, dy
            while ptr_to_int(left) != ptr_to_int(o):
                sums = fma(load(at, taps, x_tap), load(errors, 1, 0), sums)
                at, errors, left = at + pixel, errors + dy_pixel, left + -1
            x, dy, line = x + row, dy + dy_row, line + -1
        store(c, sums, c_tap)

    def some(taps: int, o: Any, n: Any, x: Any, x_tap: Any, dy: Any, c: Any, c_tap: Any) -> None:
        """All channels of some taps."""
        left, stays = o + n, arg_int(o, 14)
        while ptr_to_int(left) != ptr_to_int(o):
            to, apart = c, c_tap
            if ptr_to_int(left) < ptr_to_int(o + lanes):
                if n < lanes:
                    to, apart = stack_bytes(STACK), width
                    if stays != 0:
                        store(to, load(c, taps, c_tap), width)
                else:
                    back = (ptr_to_int(left) - ptr_to_int(o + lanes)) * size
                    x, dy, to = x + back, dy + back, to + back
            if taps == 3:
                if x_tap == arg_int(o, 10):
                    near_block(o, x, x_tap, dy, to, apart, stays)
                else:
                    block(taps, o, x, x_tap, dy, to, apart, stays)
            else:
                block(taps, o, x, x_tap, dy, to, apart, stays)
            if n < lanes:
                for i in range(taps):
                    for j in range(n):
                        put(c + (i * c_tap + j * size), get(to + (i * width + j * size)))
            x, dy, c = x + width, dy + width, c + width
            left = int_to_ptr(larger(ptr_to_int(left + -lanes), ptr_to_int(o)))

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        o = args
        x, dy, c = arg_ptr(o, 0), arg_ptr(o, 1), arg_ptr(o, 2)
        n, x_tap, c_tap = arg_int(o, 5), arg_int(o, 8), arg_int(o, 15)
        line = o + arg_int(o, 6)
        while ptr_to_int(line) != ptr_to_int(o):
            at, left = x, o + arg_int(o, 7)
            while ptr_to_int(left) >= ptr_to_int(o + 3):
                some(3, o, n, at, x_tap, dy, c, c_tap)
                at, c, left = at + 3 * x_tap, c + 3 * c_tap, left + -3
            while ptr_to_int(left) != ptr_to_int(o):
                some(1, o, n, at, x_tap, dy, c, c_tap)
                at, c, left = at + x_tap, c + c_tap, left + -1
            x, line = x + arg_int(o, 9), line + -1

    return with_lanes(kernel, lanes)


@dataclass(frozen=True)
class Gradient:
    """A gradient's addresses and shape; see `headrace.micro.kernels.depthwise.Convolved`.

    Attributes:
        x, dy, c: addresses of the image, of gradients of what was made of it, and of those of
            weights, tap by tap.
        rows, columns, channels: of dy.
        stays: whether the gradient is added to what is there.
    """

    x: Any
    dy: Any
    c: Any
    rows: int
    columns: int
    channels: int
    lines: int
    taps: int
    x_tap: int
    x_line: int
    x_pixel: int
    x_row: int
    dy_pixel: int
    dy_row: int
    stays: bool
    c_tap: int

    @property
    def slots(self) -> tuple[Any, ...]:
        """The argument block."""
        found = (getattr(self, one.name) for one in fields(self))
        return tuple(int(one) if isinstance(one, bool) else one for one in found)


def reference(numbers: Numbers, seen: np.ndarray, dy: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The gradient [tap lines, taps, channels] of weights, on top of `start`."""
    of = numbers.arithmetic
    sums = of.operand(start)
    for row, column in np.ndindex(dy.shape[:2]):
        sums = of.fma(seen[row, column], dy[row, column], sums)
    return numbers.stored(sums)


def _cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    numbers, dtype = numbers_of(target, kind), dtype_of(kind)
    for windows, x, seen, (rows, columns, n) in images(kind, rng):
        for stays in (False, True):
            if stays and n % numbers.lanes:
                continue
            dy = rng.standard_normal((rows, columns, n)).astype(dtype)
            c = rng.standard_normal((*windows.taps, n)).astype(dtype)
            expected = reference(numbers, seen, dy, c * stays)
            block = Gradient(
                x, dy, c, rows, columns, n, *windows.taps, x.strides[1], x.strides[0],
                windows.strides[1] * x.strides[1], windows.strides[0] * x.strides[0],
                dy.strides[1], dy.strides[0], stays, c.strides[1],
            )  # fmt: skip
            label = f"{windows} {c.shape} {stays}"
            yield Case(list(block.slots), [(c, expected)], 0, label)


def _build(kind: Kind, target: Target) -> KernelFunction:
    return _gradient(numbers_of(target, kind))


def all_kernels() -> list[Kernel]:
    """One for each kind of number."""
    sources = (__name__, images.__module__, numbers_of.__module__)
    return [
        Kernel(name, partial(_build, kind), sources, partial(_cases, kind))
        for kind, name in NAMES.items()
    ]
