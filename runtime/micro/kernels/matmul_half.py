"""Products of matrices of IEEE halves: what convolutions and their gradients come down to.

`c = a b` for a [n, k], b [k, m] and c [n, m], whose rows of m halves lie in one piece; elements of
`a` may lie anywhere, so that a transposed matrix needs no copy. A vector holds neighbours of a row
of c, and each sum takes its products in the order of k: bits do not depend on the blocking. Chips
that compute with halves round each multiply-add to one; others add in float32, and round at the
end. The last vector of a row begins early enough to end with it, so some of its elements are
computed twice; rows shorter than a vector have room for one.

Source: PULP-TrainLib's primitives (Nadalini et al., 2022), with vectors along m in place of pairs
along k, which need a transposed b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from headrace.targets.fp16 import HALF, SINGLE, Arithmetic
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_f16,
    bcast_half,
    fma,
    load_f16,
    load_half,
    ptr_to_int,
    store_f16,
    store_half,
    with_lanes,
    zeros_f32,
    zeros_half,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAME = "matmul_half"


def lanes_of(target: Target) -> int:
    """Elements of a vector: of halves, or of numbers in registers of their own."""
    return 8 if target.vector_bytes == 16 else 4


def _rows(target: Target) -> int:
    """Rows of sums that registers hold, two vectors each, beside what they are made of."""
    if target.vector_bytes < 16:
        return 3
    return 6 if target.architecture.startswith("riscv") else 3


def _product(half: bool, lanes: int, most_rows: int) -> KernelFunction:
    load, bcast, zeros, store = (
        (load_half, bcast_half, zeros_half, store_half)
        if half
        else (load_f16, bcast_f16, zeros_f32, store_f16)
    )

    def step(
        rows: int, vectors: int, a: Any, a_row: Any, b: Any, first: Any, second: Any
    ) -> tuple[Any, Any]:
        """One product for each sum."""
        weights = bcast(a, rows, a_row)
        first = fma(weights, load(b, 1, 0), first)
        if vectors == 2:
            second = fma(weights, load(b + 2 * lanes, 1, 0), second)
        return first, second

    def block(
        rows: int, vectors: int, k: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_row: Any,
        c: Any, c_row: Any,
    ) -> None:  # fmt: skip
        """`rows` rows of 1 or 2 vectors."""
        first, second = zeros(rows), zeros(rows)
        # Addresses have the chip's 32 bits, and a counter would have 64.
        end = ptr_to_int(b + k * b_row)
        pairs = ptr_to_int(b + (k & -2) * b_row)
        while ptr_to_int(b) != pairs:
            first, second = step(rows, vectors, a, a_row, b, first, second)
            first, second = step(rows, vectors, a + a_step, a_row, b + b_row, first, second)
            a = a + 2 * a_step
            b = b + 2 * b_row
        if ptr_to_int(b) != end:
            first, second = step(rows, vectors, a, a_row, b, first, second)
        store(c, first, c_row)
        if vectors == 2:
            store(c + 2 * lanes, second, c_row)

    def columns(
        rows: int, k: Any, m: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_row: Any, c: Any,
        c_row: Any,
    ) -> None:  # fmt: skip
        """`rows` rows of all vectors."""
        j = 0
        while j + 2 * lanes <= m:
            block(rows, 2, k, a, a_row, a_step, b + j * 2, b_row, c + j * 2, c_row)
            j += 2 * lanes
        while j < m:
            at = j
            if j + lanes > m and m >= lanes:
                at = m - lanes
            block(rows, 1, k, a, a_row, a_step, b + at * 2, b_row, c + at * 2, c_row)
            j += lanes

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, b, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
        n, k, m = arg_int(args, 3), arg_int(args, 4), arg_int(args, 5)
        a_row, a_step = arg_int(args, 6), arg_int(args, 7)
        b_row, c_row = arg_int(args, 8), arg_int(args, 9)
        i = 0
        while i + most_rows <= n and i + 4 != n:
            columns(most_rows, k, m, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row)
            i += most_rows
        # Of 4 rows 2 and 2 are better than 3 and 1.
        while i + 2 <= n:
            columns(2, k, m, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row)
            i += 2
        while i < n:
            columns(1, k, m, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row)
            i += 1

    return with_lanes(kernel, lanes)


def _build(target: Target) -> KernelFunction:
    return _product(target.half, lanes_of(target), _rows(target))


def reference(target: Target, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What a chip makes of float16 [n, k] and [k, m]: float16 [n, m]."""
    sums = Arithmetic(HALF if target.half else SINGLE).matmul(a, b)
    half = Arithmetic(HALF)
    return half.stored(half.round(sums))


def slots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[Any]:
    """The argument block of a product of arrays of halves, any of which may be a view."""
    n, k = a.shape
    return [a, b, c, n, k, c.shape[1], a.strides[0], a.strides[1], b.strides[0], c.strides[0]]


_SHAPES = ((1, 1, 8), (5, 7, 8), (4, 16, 32), (7, 33, 19), (3, 9, 13), (2, 5, 3))
_DATA: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    # Products that are no normal numbers, and sums that are none.
    "small": lambda rng, shape: rng.standard_normal(shape) * 2.0**-12,
    "large": lambda rng, shape: rng.uniform(0, 200, shape),
}


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    lanes = lanes_of(target)
    for kind, draw in _DATA.items():
        for n, k, m in _SHAPES:
            for turned in (False, True):
                a = draw(rng, (k, n) if turned else (n, k)).astype(np.float16)
                a = a.T if turned else a
                room = max(m, lanes)
                b = np.zeros((k, room), np.float16)
                b[:, :m] = draw(rng, (k, m))
                c = np.zeros((n, room), np.float16)
                expected = np.zeros_like(c)
                expected[:, :m] = reference(target, a, b[:, :m])
                block = [*slots(a, b, c[:, :m])]
                block[2] = c
                label = f"{n}x{k}x{m} {kind}{' turned' * turned}"
                yield Case(block, [(c, expected)], 0, label)


def all_kernels() -> list[Kernel]:
    """One product; the target decides what it adds in."""
    return [Kernel(NAME, _build, (__name__,), _cases)]
