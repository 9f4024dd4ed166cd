"""Sums of two arrays of int8 codes; see `headrace.micro.int8.add`."""

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
    shl,
    splat_i32,
    store_i8,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME = "add_i8"
SCRATCH_BYTES = 16
MORE_BITS = 20


def _scaled(codes: Any, minus_zero: Any, multiplier: Any, down: Any) -> Any:
    return rounding_shift(doubling_high(shl(codes + minus_zero, MORE_BITS), multiplier), down)


def _build(target: Target) -> KernelFunction:
    lanes = lanes_of(target)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, b, c, room = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_ptr(args, 3)
        left = int32(arg_int(args, 4))
        a_zero, a_by, a_down = (
            splat_i32(arg_int(args, 5)), splat_i32(arg_int(args, 6)), splat_i32(arg_int(args, 7))
        )  # fmt: skip
        b_zero, b_by, b_down = (
            splat_i32(arg_int(args, 8)), splat_i32(arg_int(args, 9)), splat_i32(arg_int(args, 10))
        )  # fmt: skip
        by, down = splat_i32(arg_int(args, 11)), splat_i32(arg_int(args, 12))
        zero, low, high = (
            splat_i32(arg_int(args, 13)), splat_i32(arg_int(args, 14)), splat_i32(arg_int(args, 15))
        )  # fmt: skip
        while left > 0:
            total = _scaled(load_i8_i32(a, 1, 0), a_zero, a_by, a_down)
            total = total + _scaled(load_i8_i32(b, 1, 0), b_zero, b_by, b_down)
            codes = within(rounding_shift(doubling_high(total, by), down) + zero, low, high)
            if left >= lanes:
                store_i8(c, codes, 0)
            else:
                store_first(c, codes, left, room)
            a, b, c, left = a + lanes, b + lanes, c + lanes, left - lanes

    return with_lanes(kernel, lanes)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n in (64, 77, 3):
        for kind in ("random", "ties"):
            parts = []
            total = np.zeros(n, np.int64)
            slots: list[int] = []
            for zero in (-128, 3):
                codes = rng.integers(-128, 128, n + 16).astype(np.int8)
                by, down = (int(rng.integers(2**30, 2**31)), 1) if kind == "random" else (2**30, 0)
                down = down + int(rng.integers(0, 3))
                wide = codes[:n].astype(np.int64) - zero << MORE_BITS
                total += multiplied(wide, by, -down)
                parts.append(codes)
                slots += [-zero, by, -down]
            by, down = (int(rng.integers(2**30, 2**31)), 19) if kind == "random" else (2**30, 18)
            expected = np.clip(multiplied(total, by, -down) - 5, -120, 127).astype(np.int8)
            c, room = np.zeros(n, np.int8), np.zeros(SCRATCH_BYTES, np.int8)
            block = [*parts, c, room, n, *slots, by, -down, -5, -120, 127]
            yield Case(block, [(c, expected)], 0, f"{n} {kind}")


def all_kernels() -> list[Kernel]:
    """One sum."""
    return [Kernel(NAME, _build, (__name__, lanes_of.__module__), _cases)]
