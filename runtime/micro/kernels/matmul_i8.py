"""Products of matrices of signed bytes, given as codes again: fully connected and 1x1 layers.

`c = clamp(requantised(a b' + bias) + zero)` for inputs a [n, k] and weights b [m, k], both with k
in one piece, int32 biases and for each row of weights a multiplier and a shift
(`headrace.micro.fixed_point.multiplied`). Zero points of inputs are in the biases. Sums are exact.
A row of weights is filled up with zeros to whole pieces; behind a row of inputs any bytes may be
read.

Sums stand in single registers, as Armv8.1-M multiplies and adds up 16 pairs of bytes in one
instruction (`vmlava`); those of two rows wait in a buffer until all of their outputs are known.
Source: "Quantization and Training of Neural Networks" (Jacob et al., 1712.05877), section 2.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from headrace.micro.fixed_point import multiplied
from headrace.micro.kernels.requantise import by_lanes, lanes_of, requantised, store_first
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    dot_sum,
    get_i32,
    int32,
    load_i32,
    load_u8,
    ptr_to_int,
    put_i32,
    shl_by,
    splat_i32,
    store_i8,
    store_i32,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME = "matmul_i8"
ROWS = 2  # of inputs, that sums are kept of


def piece_of(target: Target) -> int:
    """Bytes that are multiplied at a time."""
    return 4 * lanes_of(target)


def sums_bytes(target: Target, m: int) -> int:
    """Of the buffer of a product with m rows of weights."""
    return ROWS * 4 * sums_of_row(target, m)


def sums_of_row(target: Target, m: int) -> int:
    """Sums that the buffer has room for in a row: whole vectors, and one more for a rest."""
    lanes = lanes_of(target)
    return -(-m // lanes) * lanes


def packed(weights: np.ndarray, target: Target) -> np.ndarray:
    """Weights int8 [m, k] as the kernel reads them."""
    return np.pad(weights, ((0, 0), (0, -weights.shape[1] % piece_of(target))))


def product_of(target: Target) -> Callable[..., None]:
    """A product of 1 or 2 rows, for kernels to inline."""
    lanes, piece = lanes_of(target), piece_of(target)

    def block(
        rows: int, columns: int, a: Any, a_row: Any, b: Any, k: Any, bias: Any, sums: Any,
        sums_row: Any,
    ) -> None:  # fmt: skip
        """1 or 2 rows of inputs times 1 or 2 of weights."""
        first = int32(get_i32(bias))
        second = int32(get_i32(bias + 4 * (columns - 1)))
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
            a, b = a + piece, b + piece
            other_a, other_b = other_a + piece, other_b + piece
        put_i32(sums, first)
        if columns == 2:
            put_i32(sums + 4, second)
        if rows == 2:
            put_i32(sums + sums_row, third)
            if columns == 2:
                put_i32(sums + sums_row + 4, fourth)

    def outputs(
        c: Any, sums: Any, m: Any, multipliers: Any, downs: Any, zero: Any, low: Any, high: Any
    ) -> None:
        """A row of outputs; the rest of the last vector is not stored."""
        left = m
        while left >= lanes:
            codes = requantised(load_i32(sums, 1, 0), multipliers, downs, zero, low, high)
            store_i8(c, codes, 0)
            c, sums = c + lanes, sums + 4 * lanes
            multipliers, downs = multipliers + 4 * lanes, downs + 4 * lanes
            left = left - lanes
        if left != 0:
            codes = requantised(load_i32(sums, 1, 0), multipliers, downs, zero, low, high)
            store_first(c, codes, left, sums)

    def shift_up(sums: Any, ups: Any, m: Any) -> None:
        while m > 0:
            store_i32(sums, shl_by(load_i32(sums, 1, 0), load_i32(ups, 1, 0)), 0)
            sums, ups, m = sums + 4 * lanes, ups + 4 * lanes, m - lanes

    def product(
        rows: int, a: Any, a_row: Any, b: Any, c: Any, c_row: Any, k: Any, m: Any, bias: Any,
        multipliers: Any, downs: Any, ups: Any, sums: Any, zero: Any, low: Any, high: Any,
    ) -> None:  # fmt: skip
        """1 or 2 rows of inputs times all weights; `ups` of 0: no sum is shifted up first."""
        sums_row = 4 * ((m + (lanes - 1)) & -lanes)
        at, left = sums, m
        while left >= 2:
            block(rows, 2, a, a_row, b, k, bias, at, sums_row)
            b, bias, at, left = b + 2 * k, bias + 8, at + 8, left - 2
        if left != 0:
            block(rows, 1, a, a_row, b, k, bias, at, sums_row)
        for i in range(rows):
            if ptr_to_int(ups) != 0:
                shift_up(sums + i * sums_row, ups, m)
            outputs(c + i * c_row, sums + i * sums_row, m, multipliers, downs, zero, low, high)

    return product


def _build(target: Target) -> KernelFunction:
    product = product_of(target)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, b, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
        bias, multipliers, downs = arg_ptr(args, 3), arg_ptr(args, 4), arg_ptr(args, 5)
        ups, sums = arg_ptr(args, 6), arg_ptr(args, 7)
        n, k, m = int32(arg_int(args, 8)), int32(arg_int(args, 9)), int32(arg_int(args, 10))
        a_row, c_row = int32(arg_int(args, 11)), int32(arg_int(args, 12))
        zero, low, high = (
            splat_i32(arg_int(args, 13)), splat_i32(arg_int(args, 14)), splat_i32(arg_int(args, 15))
        )  # fmt: skip
        while n >= ROWS:
            product(ROWS, a, a_row, b, c, c_row, k, m, bias, multipliers, downs, ups, sums, zero,
                    low, high)  # fmt: skip
            a, c, n = a + ROWS * a_row, c + ROWS * c_row, n - ROWS
        if n != 0:
            product(1, a, a_row, b, c, c_row, k, m, bias, multipliers, downs, ups, sums, zero, low,
                    high)  # fmt: skip

    return with_lanes(kernel, lanes_of(target))


def scaling_of(
    multipliers: np.ndarray, shifts: np.ndarray, target: Target
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Multipliers, shifts to the right and those to the left (None: there are none) as vectors."""
    ups = by_lanes(np.maximum(shifts, 0), target) if (shifts > 0).any() else None
    return by_lanes(multipliers, target), by_lanes(np.minimum(shifts, 0), target), ups


def reference(
    a: np.ndarray, b: np.ndarray, bias: np.ndarray, multipliers: np.ndarray, shifts: np.ndarray,
    zero: int, low: int, high: int,
) -> np.ndarray:  # fmt: skip
    """int8 [n, m] of int8 [n, k] and [m, k], int32 [m] each."""
    sums = a.astype(np.int64) @ b.T.astype(np.int64) + bias
    return np.clip(multiplied(sums, multipliers, shifts) + zero, low, high).astype(np.int8)


def slots(
    target: Target, a: np.ndarray, b: np.ndarray, bias: np.ndarray, multipliers: np.ndarray,
    shifts: np.ndarray, c: np.ndarray, zero: int, low: int, high: int,
) -> list[Any]:  # fmt: skip
    """The argument block of arrays: behind rows of `a` is what may be read."""
    n, m = c.shape
    weights = packed(b, target)
    factors, downs, ups = scaling_of(multipliers, shifts, target)
    sums = np.zeros(sums_bytes(target, m), np.uint8)
    return [
        a, weights, c, by_lanes(bias, target), factors, downs, 0 if ups is None else ups, sums, n,
        weights.shape[1], m, a.strides[0], c.strides[0], zero, low, high,
    ]  # fmt: skip


_SHAPES = ((1, 16, 4), (3, 40, 7), (2, 64, 12), (5, 9, 3), (4, 144, 33))


def scales_for(
    rng: np.random.Generator, kind: str, k: int, m: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Biases, multipliers and shifts for tests: random ones, or ties and shifts to the left."""
    if kind == "random":
        bias = rng.integers(-30_000, 30_000, m)
        multipliers, shifts = rng.integers(2**30, 2**31, m), rng.integers(-11, -4, m)
    else:
        bias = rng.integers(-2, 3, m) << rng.integers(0, 20, m)
        multipliers, shifts = np.full(m, 2**30), rng.integers(-12, 3, m)
    return tuple(one.astype(np.int32) for one in (bias, multipliers, shifts))  # type: ignore[return-value]


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n, k, m in _SHAPES:
        for kind in ("random", "extreme"):
            a = np.full((n, -(-k // 16) * 16), -128, np.int8)
            if kind == "random":
                a[:, :k] = rng.integers(-128, 128, (n, k))
                b = rng.integers(-127, 128, (m, k)).astype(np.int8)
            else:
                b = rng.choice((-127, 127), (m, k)).astype(np.int8)
            scaling = scales_for(rng, kind, k, m)
            c = np.zeros((n, m), np.int8)
            expected = reference(a[:, :k], b, *scaling, -3, -128, 120)
            block = slots(target, a, b, *scaling, c, -3, -128, 120)
            yield Case(block, [(c, expected)], 0, f"{n}x{k}x{m} {kind}")


def all_kernels() -> list[Kernel]:
    """One product; the target decides how much it multiplies at a time."""
    return [Kernel(NAME, _build, (__name__, requantised.__module__), _cases)]
