"""Products of two arrays of int8 codes; see `headrace.micro.int8.multiply`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.micro.fixed_point import multiplied
from headrace.micro.kernels.requantise import lanes_of, store_first, within
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    doubling_high,
    int32,
    load_i8_i32,
    rounding_shift,
    splat_i32,
    store_i8,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME = "multiply_i8"
SCRATCH_BYTES = 16
MOST_UP = 14  # bits that products are shifted to the left


def _build(target: Target) -> KernelFunction:
    lanes = lanes_of(target)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, factors, c, room = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_ptr(args, 3)
        pixels, channels = int32(arg_int(args, 4)), int32(arg_int(args, 5))
        a_zero, b_zero = splat_i32(arg_int(args, 6)), splat_i32(arg_int(args, 7))
        power, by, down = (
            splat_i32(arg_int(args, 8)), splat_i32(arg_int(args, 9)), splat_i32(arg_int(args, 10))
        )  # fmt: skip
        zero, low, high = (
            splat_i32(arg_int(args, 11)), splat_i32(arg_int(args, 12)), splat_i32(arg_int(args, 13))
        )  # fmt: skip
        while pixels != 0:
            b, left = factors, channels
            while left > 0:
                product = (load_i8_i32(a, 1, 0) + a_zero) * (load_i8_i32(b, 1, 0) + b_zero)
                codes = rounding_shift(doubling_high(product * power, by), down)
                codes = within(codes + zero, low, high)
                if left >= lanes:
                    store_i8(c, codes, 0)
                    a, b, c = a + lanes, b + lanes, c + lanes
                else:
                    store_first(c, codes, left, room)
                    a, c = a + left, c + left
                left = left - lanes
            pixels = pixels - int32(1)

    return with_lanes(kernel, lanes)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for pixels, channels, up, down in ((1, 64, 0, 6), (3, 5, 0, 0), (2, 13, 3, 0), (1, 3, 0, 7)):
        a = rng.integers(-128, 128, (pixels, channels)).astype(np.int8)
        b = rng.integers(-128, 128, channels).astype(np.int8)
        by = int(rng.integers(2**30, 2**31))
        product = (a.astype(np.int64) + 128) * (b.astype(np.int64) - 3)
        expected = np.clip(multiplied(product, by, up - down) - 5, -120, 127).astype(np.int8)
        for in_place in (False, True):
            given = a.copy()
            c = given if in_place else np.zeros_like(a)
            block = [given, b, c, np.zeros(SCRATCH_BYTES, np.int8), pixels, channels, 128, -3]
            block += [1 << up, by, -down, -5, -120, 127]
            yield Case(block, [(c, expected)], 0, f"{pixels}x{channels} in place: {in_place}")


def all_kernels() -> list[Kernel]:
    """One for each chip."""
    return [Kernel(NAME, _build, (__name__, lanes_of.__module__), _cases)]
