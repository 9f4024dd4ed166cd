"""Products of matrices of signed bytes, given as bytes again: fully connected and 1x1 layers.

`c = clamp(round(scale * (a b' + bias)) + zero)` for inputs a [n, k] and weights b [m, k], both with
k in one piece, int32 biases and float32 scales for each row of weights. Zero points of inputs are
in the biases. Sums are exact; float32 takes them to the output's scale, and rounds to even. A row
of weights is filled up with zeros to 16 bytes; behind a row of inputs any 15 bytes may be read.

Sums stand in single registers, as Armv8.1-M multiplies and adds up 16 pairs of bytes in one
instruction (`vmlava`); those of two rows wait in a buffer until all of their outputs are known.
Source: "Quantization and Training of Neural Networks" (Jacob et al., 1712.05877), equation 7, with
a float for its fixed-point multiplier.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.targets.fp16 import SINGLE, Arithmetic
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    dot_sum,
    fma,
    get_i32,
    load_f32,
    load_i32,
    load_u8,
    maximum,
    minimum,
    ptr_to_int,
    put_i32,
    round_i32,
    splat_f32,
    store_i8,
    sum_start,
    to_f32,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

NAME = "matmul_i8"
LANES = 4
PIECE = 16  # bytes that are multiplied at a time


def _sums(
    rows: int, columns: int, a: Any, a_row: Any, b: Any, k: Any, bias: Any, sums: Any, sums_row: Any
) -> None:
    """1 or 2 rows of inputs times 1 or 2 of weights."""
    first = sum_start(get_i32(bias))
    second = sum_start(get_i32(bias + 4 * (columns - 1)))
    third, fourth = first, second
    other_a, other_b = a + a_row * (rows - 1), b + k * (columns - 1)
    end = ptr_to_int(a + k)
    while ptr_to_int(a) != end:
        x, w = load_u8(a, 1, 0), load_u8(b, 1, 0)
        first = dot_sum(first, x, w)
        if columns == 2:
            v = load_u8(other_b, 1, 0)
            second = dot_sum(second, x, v)
        if rows == 2:
            y = load_u8(other_a, 1, 0)
            third = dot_sum(third, y, w)
            if columns == 2:
                fourth = dot_sum(fourth, y, v)
        a, b = a + PIECE, b + PIECE
        other_a, other_b = other_a + PIECE, other_b + PIECE
    put_i32(sums, first)
    if columns == 2:
        put_i32(sums + 4, second)
    if rows == 2:
        put_i32(sums + sums_row, third)
        if columns == 2:
            put_i32(sums + sums_row + 4, fourth)


def _output(c: Any, sums: Any, scales: Any, zero: Any, low: Any, high: Any) -> None:
    x = fma(to_f32(load_i32(sums, 1, 0)), load_f32(scales, 1, 0), zero)
    store_i8(c, round_i32(minimum(maximum(x, low), high)), 0)


def _outputs(c: Any, sums: Any, scales: Any, m: Any, zero: Any, low: Any, high: Any) -> None:
    """A row of outputs, 4 at a time; the last 4 end with the row."""
    end = ptr_to_int(sums + 4 * (m & -LANES))
    while ptr_to_int(sums) != end:
        _output(c, sums, scales, zero, low, high)
        c, sums, scales = c + LANES, sums + 4 * LANES, scales + 4 * LANES
    rest = m & (LANES - 1)
    if rest > 0:
        back = LANES - rest
        if m < LANES:
            back = 0
        _output(c + -back, sums + -4 * back, scales + -4 * back, zero, low, high)


def _rows(rows: int, a: Any, a_row: Any, b: Any, c: Any, c_row: Any, k: Any, m: Any, bias: Any,
          scales: Any, sums: Any, zero: Any, low: Any, high: Any) -> None:  # fmt: skip
    sums_row = 4 * m
    # Addresses have the chip's 32 bits, and counters would have 64.
    at, end = sums, ptr_to_int(sums + 4 * (m & -2))
    while ptr_to_int(at) != end:
        _sums(rows, 2, a, a_row, b, k, bias, at, sums_row)
        b, bias, at = b + 2 * k, bias + 8, at + 8
    if m & 1:
        _sums(rows, 1, a, a_row, b, k, bias, at, sums_row)
    for i in range(rows):
        _outputs(c + i * c_row, sums + i * sums_row, scales, m, zero, low, high)


def _kernel(args: Any, thread: Any, n_threads: Any) -> None:
    a, b, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
    bias, scales, sums = arg_ptr(args, 3), arg_ptr(args, 4), arg_ptr(args, 5)
    n, k, m = arg_int(args, 6), arg_int(args, 7), arg_int(args, 8)
    a_row, c_row = arg_int(args, 9), arg_int(args, 10)
    zero, low, high = (
        splat_f32(arg_float(args, 11)), splat_f32(arg_float(args, 12)),
        splat_f32(arg_float(args, 13)),
    )  # fmt: skip
    i = 0
    while i + 2 <= n:
        _rows(2, a + i * a_row, a_row, b, c + i * c_row, c_row, k, m, bias, scales, sums, zero, low,
              high)  # fmt: skip
        i += 2
    if i < n:
        _rows(1, a + i * a_row, a_row, b, c + i * c_row, c_row, k, m, bias, scales, sums, zero, low,
              high)  # fmt: skip


def reference(
    a: np.ndarray,
    b: np.ndarray,
    bias: np.ndarray,
    scales: np.ndarray,
    zero: int,
    low: int,
    high: int,
) -> np.ndarray:
    """int8 [n, m] of int8 [n, k] and [m, k], int32 [m] and float32 [m]."""
    sums = a.astype(np.int64) @ b.T.astype(np.int64) + bias
    single = Arithmetic(SINGLE)
    x = single.fma(single.round(sums), scales, float(zero))
    return np.rint(np.clip(x, low, high)).astype(np.int8)


def slots(
    a: np.ndarray, b: np.ndarray, bias: np.ndarray, scales: np.ndarray, c: np.ndarray, zero: int,
    low: int, high: int,
) -> list[Any]:  # fmt: skip
    """The argument block: c int8 [n, m]; k of `b` is a multiple of 16, that of `a` no more."""
    n, m = c.shape
    sums = np.zeros((2, m), np.int32)
    return [
        a, b, c, bias, scales, sums, n, b.shape[1], m, a.strides[0], c.strides[0],
        float(zero), float(low), float(high),
    ]  # fmt: skip


_SHAPES = ((1, 16, 4), (3, 40, 7), (2, 64, 12), (5, 9, 3), (4, 144, 33))


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n, k, m in _SHAPES:
        for kind in ("random", "extreme"):
            whole = -(-k // PIECE) * PIECE
            room = max(m, LANES)  # what is shorter than a vector has the room of one
            a = np.full((n, whole), -128, np.int8)
            b, bias = np.zeros((m, whole), np.int8), np.zeros(room, np.int32)
            scales, c = np.zeros(room, np.float32), np.zeros((n, room), np.int8)
            if kind == "random":
                a[:, :k] = rng.integers(-128, 128, (n, k))
                b[:, :k] = rng.integers(-127, 128, (m, k))
                bias[:m] = rng.integers(-30_000, 30_000, m)
                scales[:m] = rng.uniform(0.2, 2, m) / (60 * 60 * k**0.5)
            else:
                b[:, :k] = rng.choice((-127, 127), (m, k))
                scales[:m] = 2.0 ** -(7 + rng.integers(0, 12, m))
            expected = np.zeros_like(c)
            expected[:, :m] = reference(a, b, bias[:m], scales[:m], -3, -128, 120)
            block = slots(a, b, bias, scales, c[:, :m], -3, -128, 120)
            block[2], block[5] = c, np.zeros((2, room), np.int32)
            yield Case(block, [(c[:, :m], expected[:, :m])], 0, f"{n}x{k}x{m} {kind}")


def all_kernels() -> list[Kernel]:
    """One product for all chips."""
    return [Kernel(NAME, same_for_all(with_lanes(_kernel, LANES)), (__name__,), _cases)]
