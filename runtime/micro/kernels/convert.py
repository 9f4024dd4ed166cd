"""From int32 sums to float32, and from that to int8 codes.

What a code is as a number is read of a table; see `headrace.micro.kernels.lookup_single`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    get_i32,
    get_u8,
    load_f32,
    load_i32,
    maximum,
    minimum,
    put_i32,
    put_u8,
    round_i32,
    splat_f32,
    splat_i32,
    stack_bytes,
    store_f32,
    store_i8,
    to_f32,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

OF_SUMS, TO_CODES = "sums_single", "codes_single"
_LANES = 4
_FAR = 1024.0  # more than any code and zero point, in codes


def _of_sums(args: Any, thread: Any, n_threads: Any) -> None:
    sums, scales, made, left = (
        arg_ptr(args, 0),
        arg_ptr(args, 1),
        arg_ptr(args, 2),
        arg_int(args, 3),
    )
    room = stack_bytes(16)
    while left > 0:
        numbers = to_f32(load_i32(sums, 1, 0)) * load_f32(scales, 1, 0)
        if left >= _LANES:
            store_f32(made, numbers, 0)
        else:
            store_f32(room, numbers, 0)
            for i in range(left):
                put_i32(made + 4 * i, get_i32(room + 4 * i))
        sums, scales, made, left = sums + 16, scales + 16, made + 16, left - _LANES


def _to_codes(args: Any, thread: Any, n_threads: Any) -> None:
    numbers, made, left = arg_ptr(args, 0), arg_ptr(args, 1), arg_int(args, 2)
    scale, zero = splat_f32(arg_float(args, 3)), splat_i32(arg_int(args, 4))
    room = stack_bytes(16)
    while left > 0:
        near = load_f32(numbers, 1, 0) / scale
        near = minimum(splat_f32(_FAR), maximum(splat_f32(-_FAR), near))
        codes = to_f32(round_i32(near) + zero)
        codes = minimum(splat_f32(127.0), maximum(codes, splat_f32(-128.0)))
        whole = round_i32(codes)
        if left >= _LANES:
            store_i8(made, whole, 0)
        else:
            store_i8(room, whole, 0)
            for i in range(left):
                put_u8(made + i, get_u8(room + i))
        numbers, made, left = numbers + 16, made + _LANES, left - _LANES


def of_sums_reference(sums: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 of int32 [channels]."""
    found: np.ndarray = sums.astype(np.float32) * scales.astype(np.float32)
    return found


def to_codes_reference(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """int8 of float32: the nearest code, of two the even one before the zero point.

    NaN becomes the lowest.
    """
    with np.errstate(over="ignore"):
        near = np.clip(np.where(np.isnan(x), -np.inf, x / np.float32(scale)), -_FAR, _FAR)
    codes: np.ndarray = np.clip(np.rint(near).astype(np.int64) + zero, -128, 127).astype(np.int8)
    return codes


def _sums_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n in (1, 4, 10, 35):
        sums = rng.integers(-(2**30), 2**30, n).astype(np.int32)
        scales, made = rng.uniform(1e-6, 1e-2, n).astype(np.float32), np.zeros(n, np.float32)
        expected = of_sums_reference(sums, scales)
        yield Case([sums, scales, made, n], [(made, expected)], 0, str(n))


def _codes_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n, scale, zero in ((1, 0.1, 3), (4, 0.5, -128), (77, 0.02, 127), (40, 2.0, 0)):
        x = (scale * 80 * rng.standard_normal(n)).astype(np.float32)
        x[: n // 2] = ((np.arange(n // 2) - n // 4) * scale / 2).astype(np.float32)  # ties
        special = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)
        x[n // 2 : n // 2 + 4] = special[: n - n // 2]
        made, expected = np.zeros(n, np.int8), to_codes_reference(x, scale, zero)
        yield Case([x, made, n, scale, zero], [(made, expected)], 0, f"{n} of {scale}")
        if n == 77:
            expected = np.concatenate([expected.view(np.uint8), x.view(np.uint8)[n:]])
            same = x.copy().view(np.uint8)
            yield Case([same, same, n, scale, zero], [(same, expected)], 0, "in place")


def all_kernels() -> list[Kernel]:
    """Each for all chips."""
    return [
        Kernel(OF_SUMS, same_for_all(with_lanes(_of_sums, _LANES)), (__name__,), _sums_cases),
        Kernel(TO_CODES, same_for_all(with_lanes(_to_codes, _LANES)), (__name__,), _codes_cases),
    ]
