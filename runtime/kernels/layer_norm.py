"""LayerNorm of rows (Ba, Kiros and Hinton 2016, arXiv:1607.06450), and RMSNorm.

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) takes no mean away.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    fma,
    iota_i32,
    load_f32,
    part,
    repeat,
    select_lt,
    splat_f32,
    splat_i32,
    sqrt,
    store_f32,
    sum_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


_RUN = 64  # channels whose sums are formed side by side


def layer_norm(args: Any, thread: Any, n_threads: Any) -> None:
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias. Threads share the rows.

    Slots: 0 x [rows][padded], 1 weight, 2 bias, 3 y, 4 rows, 5 channels, 6 padded (to 16),
    7 epsilon (float32), 8 whether it is RMSNorm, whose mean is 0. Pads of x may be anything; those
    of weight and bias are zero, and y's.
    """
    x = arg_ptr(args, 0)
    weight = arg_ptr(args, 1)
    bias = arg_ptr(args, 2)
    y = arg_ptr(args, 3)
    rows = arg_int(args, 4)
    channels = arg_int(args, 5)
    padded = arg_int(args, 6)
    epsilon = arg_float(args, 7)
    around_zero = arg_int(args, 8)
    whole = channels // _RUN * _RUN
    for r in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        p = x + r * padded * 4
        mean = 0.0
        if around_zero == 0:
            totals = zeros_f32(4)  # so that no sum waits for the one before
            for c in range(0, whole, _RUN):
                totals = totals + load_f32(p + c * 4, 4, 64)
            total = _sum_of_four(totals)
            for c in range(whole, padded, 16):
                there = iota_i32() + splat_i32(c)
                value = load_f32(p + c * 4, 1, 0)
                total = total + select_lt(there, splat_i32(channels), value, splat_f32(0.0))
            mean = sum_f32(total) / channels
        squares = zeros_f32(4)
        for c in range(0, whole, _RUN):
            four = load_f32(p + c * 4, 4, 64) - repeat(splat_f32(mean), 4)
            squares = fma(four, four, squares)
        square = _sum_of_four(squares)
        for c in range(whole, padded, 16):
            apart = load_f32(p + c * 4, 1, 0) - splat_f32(mean)
            there = iota_i32() + splat_i32(c)
            apart = select_lt(there, splat_i32(channels), apart, splat_f32(0.0))
            square = fma(apart, apart, square)
        scale = splat_f32(1.0 / sqrt(sum_f32(square) / channels + epsilon))
        to = y + r * padded * 4
        for c in range(0, padded, 16):
            apart = (load_f32(p + c * 4, 1, 0) - splat_f32(mean)) * scale
            found = fma(apart, load_f32(weight + c * 4, 1, 0), load_f32(bias + c * 4, 1, 0))
            there = iota_i32() + splat_i32(c)
            found = select_lt(there, splat_i32(channels), found, splat_f32(0.0))
            store_f32(to + c * 4, found, 0)


def _sum_of_four(four: Any) -> Any:
    return (part(four, 0) + part(four, 1)) + (part(four, 2) + part(four, 3))


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    shapes = ((5, 48, 1.0), (3, 37, 1e3), (1, 16, 1e-3), (2, 1, 1.0), (2, 150, 3.0))
    for (rows, channels, spread), around_zero in product(shapes, (0, 1)):
        padded = -(-channels // 16) * 16
        x = np.full((rows, padded), np.nan, np.float32)
        x[:, :channels] = rng.standard_normal((rows, channels)) * spread + 3 * spread
        weight, bias = np.zeros((2, padded), np.float32)
        weight[:channels] = rng.standard_normal(channels)
        bias[:channels] = rng.standard_normal(channels)
        y = np.full((rows, padded), np.nan, np.float32)
        epsilon = 1e-5 * spread**2
        real = x[:, :channels].astype(np.float64)
        mean = real.mean(1, keepdims=True) * (1 - around_zero)
        apart = real - mean
        variance = (apart**2).mean(1, keepdims=True)
        scale = 1 / np.sqrt(variance + epsilon)
        expected = np.zeros((rows, padded))
        expected[:, :channels] = apart * scale * weight[:channels] + bias[:channels]
        # What the mean is off by is off in every difference; sums of `channels` terms twice.
        size = np.abs(real).mean(1, keepdims=True) * scale + np.abs(apart) * scale + 1
        bound = np.full((rows, padded), 1e-30)
        error = size * (channels + 8) * 2.0**-24
        bound[:, :channels] += error * np.abs(weight[:channels]) + np.abs(bias[:channels]) * 2e-7
        slots = [x, weight, bias, y, rows, channels, padded, epsilon, around_zero]
        what = f"{rows}x{channels}{' rms' * around_zero}"
        yield Case(slots, [(y, expected.astype(np.float32))], bound, what)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [Kernel("layer_norm_f32", same_for_all(layer_norm), (__name__,), _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
