"""Sums of two arrays of int8 codes; see `headrace.micro.int8.add`.

Values are added in units of twice the greater scale, with 20 bits more than codes have: of codes
with that scale these are exact, and of others with the same, too. The rest are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.micro.fixed_point import in_codes, multiplied
from headrace.micro.kernels.requantise import (
    LEAST_SHIFT,
    MOST_SHIFT,
    lanes_of,
    plain,
    plain_start,
    rounded,
    scaled,
    store_first,
    within,
)
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    get_i32,
    int32,
    load_i8_i32,
    shl,
    shl_by,
    splat_i32,
    store_i8,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME = "add_i8"
SCRATCH_BYTES = 16
MORE_BITS = 20
EXACT = (2**30, 0)  # the multiplier and the shift of codes with the greater scale


def _build(target: Target) -> KernelFunction:
    lanes = lanes_of(target)

    def put(c: Any, codes: Any, left: Any, room: Any) -> None:
        if left >= lanes:
            store_i8(c, codes, 0)
        else:
            store_first(c, codes, left, room)

    def loop(
        is_exact: bool, is_plain: bool, a: Any, b: Any, c: Any, room: Any, left: Any, a_zero: Any,
        b_zero: Any, b_by: Any, b_down: Any, by: Any, down: Any, zero: Any, low: Any, high: Any,
    ) -> None:  # fmt: skip
        """Of b's values exact ones; of sums plain ones, see `headrace.micro.kernels.requantise`."""
        b_shift, shift, one = splat_i32(0) - b_down, splat_i32(0) - down, splat_i32(1)
        b_start, start = shl_by(one, b_shift - one), plain_start(zero, shift)
        while left > 0:
            total = shl(load_i8_i32(a, 1, 0) + a_zero, MORE_BITS - 1)
            second = load_i8_i32(b, 1, 0) + b_zero
            if is_exact:
                total = total + shl(second, MORE_BITS - 1)
            elif lanes == 1:
                total = total + rounded(shl(second, MORE_BITS + 1), b_by, b_shift, b_start)
            else:
                total = total + scaled(shl(second, MORE_BITS), b_by, b_down)
            if is_plain:
                put(c, plain(total, by, shift, start), left, room)
            else:
                put(c, within(scaled(total, by, down) + zero, low, high), left, room)
            a, b, c, left = a + lanes, b + lanes, c + lanes, left - lanes

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, b, c, room = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_ptr(args, 3)
        left = int32(arg_int(args, 4))
        a_zero, b_zero = splat_i32(arg_int(args, 5)), splat_i32(arg_int(args, 6))
        b_by, b_down = splat_i32(get_i32(args + 8 * 7)), splat_i32(arg_int(args, 8))
        by, down = splat_i32(get_i32(args + 8 * 9)), splat_i32(arg_int(args, 10))
        zero, low, high = (
            splat_i32(arg_int(args, 11)), splat_i32(arg_int(args, 12)), splat_i32(arg_int(args, 13))
        )  # fmt: skip
        is_exact = int32(arg_int(args, 8)) == 0
        n = -int32(arg_int(args, 10))
        is_plain = int32(arg_int(args, 12)) == -128 and int32(arg_int(args, 13)) == 127
        is_plain = is_plain and n >= LEAST_SHIFT and n <= MOST_SHIFT
        if lanes == 1 and is_plain and is_exact:
            loop(True, True, a, b, c, room, left, a_zero, b_zero, b_by, b_down, by, down, zero,
                 low, high)  # fmt: skip
        elif lanes == 1 and is_plain:
            loop(False, True, a, b, c, room, left, a_zero, b_zero, b_by, b_down, by, down, zero,
                 low, high)  # fmt: skip
        elif is_exact:
            loop(True, False, a, b, c, room, left, a_zero, b_zero, b_by, b_down, by, down, zero,
                 low, high)  # fmt: skip
        else:
            loop(False, False, a, b, c, room, left, a_zero, b_zero, b_by, b_down, by, down, zero,
                 low, high)  # fmt: skip

    return with_lanes(kernel, lanes)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n in (64, 77, 3):
        for kind in ("random", "ties", "exact", "plain"):
            a, b = (rng.integers(-128, 128, n + 16).astype(np.int8) for _ in range(2))
            of_b = (int(rng.integers(2**30, 2**31)), -1 - int(rng.integers(0, 3)))
            if kind in ("ties", "exact"):
                of_b = EXACT if kind == "exact" else (2**30, -2)
            by, shift = (2**30, -18) if kind != "random" else (int(rng.integers(2**30, 2**31)), -19)
            ends = (-5, -128, 127) if kind in ("exact", "plain") else (-5, -120, 127)
            wide = (
                a[:n].astype(np.int64) + 128 << MORE_BITS,
                b[:n].astype(np.int64) - 3 << MORE_BITS,
            )
            total = multiplied(wide[0], *EXACT) + multiplied(wide[1], *of_b)
            expected = in_codes(multiplied(total, by, shift) + ends[0], *ends[1:])
            c, room = np.zeros(n, np.int8), np.zeros(SCRATCH_BYTES, np.int8)
            block = [a, b, c, room, n, 128, -3, *of_b, by, shift, *ends]
            yield Case(block, [(c, expected)], 0, f"{n} {kind}")


def all_kernels() -> list[Kernel]:
    """One sum."""
    return [Kernel(NAME, _build, (__name__, lanes_of.__module__), _cases)]
