"""Products of matrices of signed bytes, given as codes again: fully connected and 1x1 layers.

`c = clamp(scaled(a b' + bias) + zero)` for inputs a [n, k] and weights b [m, k], int32 biases and
for each row of weights a multiplier and a shift (`headrace.micro.fixed_point.multiplied`). Zero
points of inputs are in the biases. Sums are exact. How a chip multiplies says
`headrace.micro.kernels.product_i8`. Source: "Quantization and Training of Neural Networks" (Jacob
et al., 1712.05877), section 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.fixed_point import in_codes, multiplied
from headrace.micro.kernels import (
    product_i8,
    product_i8_bytes,
    product_i8_columns,
    product_i8_pairs,
    product_i8_sums,
    single_sums,
)
from headrace.micro.kernels.product_i8 import product_of
from headrace.micro.kernels.requantise import (
    are_plain,
    by_lanes,
    reach_of,
    requantised,
)
from headrace.targets.simd import arg_int, arg_ptr, int32, splat_i32, with_lanes
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME, ROW = "matmul_i8", "row_i8"
SOURCES = (
    __name__, product_i8.__name__, product_i8_bytes.__name__, product_i8_columns.__name__,
    product_i8_pairs.__name__, product_i8_sums.__name__, single_sums.__name__,
    requantised.__module__,
)  # fmt: skip


def _build(target: Target) -> KernelFunction:
    of = product_of(target)
    most, multiply = of.rows, of.multiply

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, stream, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
        multipliers, downs, ups = arg_ptr(args, 3), arg_ptr(args, 4), arg_ptr(args, 5)
        scratch = arg_ptr(args, 6)
        n, k, m = int32(arg_int(args, 7)), int32(arg_int(args, 8)), int32(arg_int(args, 9))
        a_row, c_row = int32(arg_int(args, 10)), int32(arg_int(args, 11))
        zero, low, high = (
            splat_i32(arg_int(args, 12)), splat_i32(arg_int(args, 13)), splat_i32(arg_int(args, 14))
        )  # fmt: skip
        while n >= most:
            multiply(most, a, a_row, stream, c, c_row, k, m, multipliers, downs, ups, scratch, zero,
                     low, high)  # fmt: skip
            a, c, n = a + most * a_row, c + most * c_row, n - most
        if most == 3 and n == 2:
            multiply(2, a, a_row, stream, c, c_row, k, m, multipliers, downs, ups, scratch, zero,
                     low, high)  # fmt: skip
            n = int32(0)
        while n != 0:
            multiply(1, a, a_row, stream, c, c_row, k, m, multipliers, downs, ups, scratch, zero,
                     low, high)  # fmt: skip
            a, c, n = a + a_row, c + c_row, n - 1

    return with_lanes(kernel, of.lanes)


def _build_row(target: Target) -> KernelFunction:
    of = product_of(target)
    multiply = of.multiply

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        zero, low, high = (
            splat_i32(arg_int(args, 12)), splat_i32(arg_int(args, 13)), splat_i32(arg_int(args, 14))
        )  # fmt: skip
        multiply(1, arg_ptr(args, 0), int32(0), arg_ptr(args, 1), arg_ptr(args, 2), int32(0),
                 int32(arg_int(args, 8)), int32(arg_int(args, 9)), arg_ptr(args, 3),
                 arg_ptr(args, 4), arg_ptr(args, 5), arg_ptr(args, 6), zero, low, high)  # fmt: skip

    return with_lanes(kernel, of.lanes)


def kernel_for(n: int) -> str:
    """The shorter one, of n rows."""
    return ROW if n == 1 else NAME


def scaling_of(
    multipliers: np.ndarray, shifts: np.ndarray, ends: tuple[int, int, int], reach: int,
    target: Target,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:  # fmt: skip
    """Multipliers, shifts to the right and those to the left as vectors.

    The last are None where sums are plain (`headrace.micro.kernels.requantise.are_plain`).
    """
    has_ups = not are_plain(shifts, ends, reach)
    ups = by_lanes(np.maximum(shifts, 0), target) if has_ups else None
    return by_lanes(multipliers, target), by_lanes(np.minimum(shifts, 0), target), ups


def reference(
    a: np.ndarray, b: np.ndarray, bias: np.ndarray, multipliers: np.ndarray, shifts: np.ndarray,
    zero: int, low: int, high: int,
) -> np.ndarray:  # fmt: skip
    """int8 [n, m] of int8 [n, k] and [m, k], int32 [m] each."""
    sums = a.astype(np.int64) @ b.T.astype(np.int64) + bias
    return in_codes(multiplied(sums, multipliers, shifts) + zero, low, high)


def slots(
    target: Target, a: np.ndarray, b: np.ndarray, bias: np.ndarray, multipliers: np.ndarray,
    shifts: np.ndarray, c: np.ndarray, zero: int, low: int, high: int,
) -> list[Any]:  # fmt: skip
    """The argument block of arrays: behind rows of `a` is what may be read."""
    n, m = c.shape
    of, k = product_of(target), b.shape[1]
    ends = (zero, low, high)
    order = of.order(m)
    factors, downs, ups = scaling_of(
        multipliers[order], shifts[order], ends, reach_of(b, bias), target
    )
    scratch = np.zeros(of.scratch_bytes(k, m, min(n, of.rows)), np.uint8)
    return [
        a, of.packed(b, bias), c, factors, downs, 0 if ups is None else ups, scratch, n,
        of.whole(k), m, a.strides[0], c.strides[0], *ends,
    ]  # fmt: skip


_SHAPES = (
    (1, 16, 4), (3, 40, 7), (2, 64, 12), (4, 64, 19), (3, 16, 9), (5, 32, 6), (5, 9, 3),
    (4, 144, 35), (1, 48, 26),
)  # fmt: skip


# Zero points and bounds for tests, by what `scales_for` makes.
ENDS = {
    "random": (-3, -128, 127), "bounded": (-3, -128, 120), "ties": (5, -128, 127),
    "extreme": (-3, -100, 120),
}  # fmt: skip


def scales_for(
    rng: np.random.Generator, kind: str, k: int, m: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Biases, multipliers and shifts for tests.

    Args:
        kind: random ones; ties of sums that are scaled plainly; or ties and shifts to the left
            ("extreme").
    """
    if kind in ("random", "bounded"):
        bias = rng.integers(-30_000, 30_000, m)
        multipliers, shifts = rng.integers(2**30, 2**31, m), rng.integers(-11, -4, m)
    else:
        bias = rng.integers(-2, 3, m) << rng.integers(0, 20, m)
        most = 0 if kind == "ties" else 3
        multipliers, shifts = np.full(m, 2**30), rng.integers(-12, most, m)
    return tuple(one.astype(np.int32) for one in (bias, multipliers, shifts))  # type: ignore[return-value]


def _cases(most: int, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n, k, m in _SHAPES:
        if n > most:
            continue
        for kind in ENDS:
            a = np.full((n, -(-k // 16) * 16), -128, np.int8)
            if kind == "extreme":
                b = rng.choice((-127, 127), (m, k)).astype(np.int8)
            else:
                a[:, :k] = rng.integers(-128, 128, (n, k))
                b = rng.integers(-127, 128, (m, k)).astype(np.int8)
            scaling = scales_for(rng, kind, k, m)
            c = np.zeros((n, m), np.int8)
            ends = ENDS[kind]
            expected = reference(a[:, :k], b, *scaling, *ends)
            block = slots(target, a, b, *scaling, c, *ends)
            yield Case(block, [(c, expected)], 0, f"{n}x{k}x{m} {kind}")
            if m <= k and k == a.shape[1]:
                over = np.array(a)
                block = slots(target, over, b, *scaling, over[:, :m], *ends)
                block[11] = m
                whole = over.copy().reshape(-1)
                whole[: n * m] = expected.reshape(-1)
                yield Case(block, [(over, whole.reshape(a.shape))], 0, f"{n}x{k}x{m} {kind} over")


def all_kernels() -> list[Kernel]:
    """A product, and that of one row; the target decides how much it multiplies at a time."""
    most = max(n for n, _, _ in _SHAPES)
    return [
        Kernel(NAME, _build, SOURCES, partial(_cases, most)),
        Kernel(ROW, _build_row, SOURCES, partial(_cases, 1)),
    ]
