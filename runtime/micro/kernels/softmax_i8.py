"""Softmax of int8 codes: exps come from a table; see `headrace.micro.int8.softmax`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.micro.fixed_point import doubling_high as exact_high
from headrace.micro.fixed_point import exp_of_negatives, reciprocal, rounding_shift
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    doubling_high,
    get_i8,
    get_i32,
    int32,
    ptr_to_int,
    put_u8,
    splat_i32,
    sum_i32,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

NAME = "softmax_i8"
SUM_BITS = 12  # in front of the point of sums of exps, which are fractions
_ONE, _LEAST, _HALF, _QUARTER = 2**31 - 1, -(2**31), 2**30, 2**29


def _high(a: Any, b: Any) -> Any:
    """`doubling_high` of single numbers."""
    return int32(sum_i32(doubling_high(splat_i32(a), splat_i32(b))))


def _shifted(a: Any, bits: int) -> Any:
    """a * 2**bits, or the nearest number that 32 bits hold."""
    if a >= 1 << (31 - bits):
        return int32(_ONE)
    if a < -1 << (31 - bits):
        return int32(_LEAST)
    return a << bits


def _one_over_one_plus(a: Any) -> Any:
    """See `headrace.micro.fixed_point`; a >= 0."""
    half = (a >> 1) + _HALF
    x = _high(half, int32(-1010580540)) + 1515870810
    x = x + _shifted(_high(x, _QUARTER - _high(half, x)), 2)
    x = x + _shifted(_high(x, _QUARTER - _high(half, x)), 2)
    x = x + _shifted(_high(x, _QUARTER - _high(half, x)), 2)
    return _shifted(x, 1)


def _kernel(args: Any, thread: Any, n_threads: Any) -> None:
    codes, exps, made = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
    pixels, channels = int32(arg_int(args, 3)), int32(arg_int(args, 4))
    multiplier, up, zero = int32(arg_int(args, 5)), int32(arg_int(args, 6)), int32(arg_int(args, 7))
    while pixels > 0:
        end = ptr_to_int(codes + channels)
        at, most = codes, int32(-128)
        while ptr_to_int(at) != end:
            code = int32(get_i8(at))
            if code > most:
                most = code
            at = at + 1
        at, total = codes, int32(0)
        while ptr_to_int(at) != end:
            power = int32(get_i32(exps + ((most - int32(get_i8(at))) << 2)))
            total = total + (((power >> (SUM_BITS - 1)) + 1) >> 1)
            at = at + 1
        # The sum's highest bit goes to the front.
        by = int32(31 + SUM_BITS - 8) - up
        while total > 0:
            total, by = total << 1, by - 1
        scale = _one_over_one_plus(total + _LEAST)
        if multiplier != 0:
            scale = _high(scale, multiplier)
        while ptr_to_int(codes) != end:
            power = int32(get_i32(exps + ((most - int32(get_i8(codes))) << 2)))
            code = zero
            if by < 32:
                code = (((_high(scale, power) >> (by - 1)) + 1) >> 1) + zero
            if code > 127:
                code = int32(127)
            put_u8(made, code)
            codes, made = codes + 1, made + 1
        pixels = pixels - 1


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    kinds = (
        (1, 12, 2**26 // 5, 0, 0, -128), (3, 5, 2**20, 0, 0, -128), (1, 300, 0, 0, 0, -128),
        (2, 9, 2**25, 255 << 23, 0, -128), (1, 7, 2**22, 3 << 29, 2, -3),
        (1, 3, 2**26, 2**30, -8, 1),
    )  # fmt: skip
    for pixels, channels, step, multiplier, up, zero in kinds:
        codes = rng.integers(-128, 128, (pixels, channels)).astype(np.int8)
        powers = np.maximum(np.arange(256) * -step, -(2**31) + 1)
        exps = exp_of_negatives(powers, 5).astype(np.int32)
        wide = codes.astype(np.int64)
        each = exps.astype(np.int64)[wide.max(1, keepdims=True) - wide]
        scale, bits = reciprocal(rounding_shift(each, SUM_BITS).sum(1, keepdims=True), SUM_BITS)
        if multiplier:
            scale = exact_high(scale, multiplier)
        found = rounding_shift(exact_high(scale, each), bits + 31 - 8 - up) + zero
        made = np.zeros_like(codes)
        expected = np.clip(found, -128, 127).astype(np.int8)
        label = f"{pixels}x{channels} by {step}"
        block = [codes, exps, made, pixels, channels, multiplier, up, zero]
        yield Case(block, [(made, expected)], 0, label)


def all_kernels() -> list[Kernel]:
    """One for all chips."""
    return [Kernel(NAME, same_for_all(with_lanes(_kernel, 1)), (__name__,), _cases)]
