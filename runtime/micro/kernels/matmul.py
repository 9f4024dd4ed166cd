"""Products of matrices of real numbers: what convolutions and their gradients come down to.

`c = clamp(start + a b)` for a [n, k], b [k, m] and c [n, m]. Rows of b, c and `start` lie in one
piece. Rows of `a` and their elements are in two levels (so many lines of so many), each with a
distance of its own: so windows of an image are multiplied where they lie, with no copy of each
("im2col"), forwards and for gradients. The elements of a row of `a` lie side by side, or else
(`turned`) those of a column do.

A vector holds neighbours of a row of c. Each sum begins at `start` (a bias, what is there already,
or zeros) and takes its products in the order of k: bits do not depend on the blocking. Chips that
compute with halves round each multiply-add to one; others add in float32, and round at the end.
The last vector of a row begins early enough to end with it, so some of its elements are computed
twice: not where `start` is c, whose m is a multiple of the lanes. Of rows shorter than a vector
elements are stored one by one; 16 bytes behind a row are read.

Source: PULP-TrainLib's primitives (Nadalini et al., 2022), with vectors along m in place of pairs
along k, which need a transposed b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.numbers import (
    KINDS,
    UNBOUNDED,
    Kind,
    Numbers,
    bounded,
    dtype_of,
    numbers_of,
)
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    fma,
    get_f32,
    get_i32,
    int32,
    int_to_ptr,
    larger,
    maximum,
    minimum,
    ptr_to_int,
    repeat,
    stack_bytes,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAMES: dict[Kind, str] = {kind: f"matmul_{kind}" for kind in KINDS}
NAME = NAMES["half"]
# Rows and vectors of blocks of sums besides those that fit a target's registers best: what
# PULP-TrainLib calls naive, unrolled, 2x4 and 4x8.
VARIANTS = ((1, 1), (2, 1), (4, 1), (2, 2))
STACK = 128  # bytes of rows that are shorter than a vector


def _block(target: Target) -> tuple[int, int]:
    """Rows of sums that registers hold and their vectors, beside what they are made of."""
    if not target.floats:
        # Multiply-adds are calls: larger blocks save 6% of instructions, and take four times the
        # code.
        return 2, 1
    if target.vector_bytes < 16:
        return 3, 2
    return (6 if target.architecture.startswith("riscv") else 3), 2


def _product(numbers: Numbers, most_rows: int, most_vectors: int) -> KernelFunction:
    load, bcast, store, splat = numbers.load, numbers.bcast, numbers.store, numbers.splat
    get, put, size, lanes = numbers.get, numbers.put, numbers.bytes, numbers.lanes
    width = lanes * size

    def step(
        rows: int, vectors: int, a: Any, a_row: Any, b: Any, first: Any, second: Any
    ) -> tuple[Any, Any]:
        """One product for each sum."""
        weights = bcast(a, rows, a_row)
        first = fma(weights, load(b, 1, 0), first)
        if vectors == 2:
            second = fma(weights, load(b + width, 1, 0), second)
        return first, second

    def block(
        rows: int, vectors: int, k: Any, lines: Any, a: Any, a_row: Any, a_step: Any, a_line: Any,
        b: Any, b_row: Any, c: Any, c_row: Any, start: Any, start_row: Any, o: Any,
    ) -> None:  # fmt: skip
        """`rows` rows of 1 or 2 vectors.

        Addresses have the chip's 32 bits, and counters would have 64: so they are addresses,
        counted from `o`, the argument block's.
        """
        if int32(start_row) == 0:
            first = repeat(load(start, 1, 0), rows)
            second = repeat(load(start + width * (vectors - 1), 1, 0), rows)
        else:
            first = load(start, rows, start_row)
            second = load(start + width * (vectors - 1), rows, start_row)
        # There is a line at least: LLVM checks once less.
        line, more = o + (lines), int32(1)
        while more != 0:
            p, left = a, o + (k >> 2)
            while ptr_to_int(left) != ptr_to_int(o):
                first, second = step(rows, vectors, p, a_row, b, first, second)
                p, b = p + a_step, b + b_row
                first, second = step(rows, vectors, p, a_row, b, first, second)
                p, b = p + a_step, b + b_row
                first, second = step(rows, vectors, p, a_row, b, first, second)
                p, b = p + a_step, b + b_row
                first, second = step(rows, vectors, p, a_row, b, first, second)
                p, b, left = p + a_step, b + b_row, left + -1
            if k & 2 != 0:
                first, second = step(rows, vectors, p, a_row, b, first, second)
                p, b = p + a_step, b + b_row
                first, second = step(rows, vectors, p, a_row, b, first, second)
                p, b = p + a_step, b + b_row
            if k & 1 != 0:
                first, second = step(rows, vectors, p, a_row, b, first, second)
                b = b + b_row
            line = line + -1
            more = int32(ptr_to_int(line) - ptr_to_int(o))
            if lanes > 1 or more != 0:
                a = a + a_line
        if get_i32(o + 8 * 18) != 0:
            low, high = splat(get_f32(o + 8 * 19)), splat(get_f32(o + 8 * 20))
            first = minimum(high, maximum(first, low))
            second = minimum(high, maximum(second, low))
        store(c, first, c_row)
        if vectors == 2:
            store(c + width, second, c_row)

    def columns(
        rows: int, m: Any, k: Any, lines: Any, a: Any, a_row: Any, a_step: Any, a_line: Any,
        b: Any, b_row: Any, c: Any, c_row: Any, start: Any, start_row: Any, o: Any,
    ) -> None:  # fmt: skip
        """`rows` rows of all vectors."""
        left = o + (m)
        if most_vectors == 2:
            behind = int32(m) - 2 * lanes
            while behind >= 0:
                block(rows, 2, k, lines, a, a_row, a_step, a_line, b, b_row, c, c_row, start,
                      start_row, o)  # fmt: skip
                b, c, start = b + 2 * width, c + 2 * width, start + 2 * width
                behind = behind - 2 * lanes
            left = o + (behind + 2 * lanes)
        while ptr_to_int(left) != ptr_to_int(o):
            to, to_row = c, c_row
            if ptr_to_int(left) < ptr_to_int(o + lanes):
                if m < lanes:
                    to, to_row = stack_bytes(STACK), width
                else:
                    back = (ptr_to_int(left) - ptr_to_int(o + lanes)) * size
                    b, to, start = b + back, to + back, start + back
            block(rows, 1, k, lines, a, a_row, a_step, a_line, b, b_row, to, to_row, start,
                  start_row, o)  # fmt: skip
            if m < lanes:
                place = to
                for i in range(rows):
                    for j in range(m):
                        put(c + (i * c_row + j * size), get(place + (i * width + j * size)))
            b, c, start = b + width, c + width, start + width
            left = int_to_ptr(larger(ptr_to_int(left + -lanes), ptr_to_int(o)))

    def rows_of(
        n: Any, m: Any, k: Any, lines: Any, a: Any, a_row: Any, a_step: Any, a_line: Any,
        b: Any, b_row: Any, c: Any, c_row: Any, start: Any, start_row: Any, o: Any,
    ) -> None:  # fmt: skip
        left = o + (n)
        if most_rows > 2:
            # Of 4 rows 2 and 2 are better than 3 and 1.
            while ptr_to_int(left) >= ptr_to_int(o + most_rows) and (
                most_rows != 3 or ptr_to_int(left) != ptr_to_int(o + 4)
            ):
                columns(most_rows, m, k, lines, a, a_row, a_step, a_line, b, b_row, c, c_row, start,
                        start_row, o)  # fmt: skip
                a, c, start = (
                    a + most_rows * a_row,
                    c + most_rows * c_row,
                    start + most_rows * start_row,
                )
                left = left + -most_rows
        if most_rows > 1:
            while ptr_to_int(left) >= ptr_to_int(o + 2):
                columns(2, m, k, lines, a, a_row, a_step, a_line, b, b_row, c, c_row, start,
                        start_row, o)  # fmt: skip
                a, c, start = a + 2 * a_row, c + 2 * c_row, start + 2 * start_row
                left = left + -2
        while ptr_to_int(left) != ptr_to_int(o):
            columns(1, m, k, lines, a, a_row, a_step, a_line, b, b_row, c, c_row, start,
                    start_row, o)  # fmt: skip
            a, c, start, left = a + a_row, c + c_row, start + start_row, left + -1

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, b, c, start = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_ptr(args, 3)
        n, k_lines, k, m = arg_int(args, 5), arg_int(args, 6), arg_int(args, 7), arg_int(args, 8)
        a_row, a_step = arg_int(args, 9), arg_int(args, 10)
        a_line, a_k_line = arg_int(args, 11), arg_int(args, 12)
        b_row, c_row, c_line = arg_int(args, 13), arg_int(args, 14), arg_int(args, 15)
        start_row, start_line = arg_int(args, 16), arg_int(args, 17)
        o = args
        line = o + arg_int(args, 4)
        while ptr_to_int(line) != ptr_to_int(o):
            if a_row == size:
                rows_of(n, m, k, k_lines, a, size, a_step, a_k_line, b, b_row, c, c_row, start,
                        start_row, o)  # fmt: skip
            else:
                rows_of(n, m, k, k_lines, a, a_row, size, a_k_line, b, b_row, c, c_row, start,
                        start_row, o)  # fmt: skip
            a, c, start, line = a + a_line, c + c_line, start + start_line, line + -1

    return with_lanes(kernel, lanes)


@dataclass(frozen=True)
class Product:
    """A product's addresses and shape; distances in bytes.

    Attributes:
        a, b, c, start: addresses.
        lines, n: rows are so many lines of so many.
        k_lines, k: the same of elements that are added up.
        m: columns.
        a_row, a_step: from row to row of a line, and from element to element: one of these is
            the size of a number.
        a_line, a_k_line: from line to line of rows, and of elements.
        b_row, c_row, c_line, start_row, start_line: the same of others.
        bounds: of c.
    """

    a: Any
    b: Any
    c: Any
    start: Any
    n: int
    k: int
    m: int
    a_row: int
    a_step: int
    b_row: int
    c_row: int
    lines: int = 1
    k_lines: int = 1
    a_line: int = 0
    a_k_line: int = 0
    c_line: int = 0
    start_row: int = 0
    start_line: int = 0
    bounds: tuple[float, float] = UNBOUNDED

    @property
    def merged(self) -> Product:
        """The same with as few lines as can be."""
        found = self
        steps = (self.a_row, self.c_row, self.start_row)
        if (self.a_line, self.c_line, self.start_line) == tuple(self.n * one for one in steps):
            found = replace(found, n=self.n * self.lines, lines=1)
        if self.a_k_line == self.k * self.a_step:
            found = replace(found, k=self.k * self.k_lines, k_lines=1)
        return found

    @property
    def slots(self) -> tuple[Any, ...]:
        """The argument block."""
        return (
            self.a, self.b, self.c, self.start, self.lines, self.n, self.k_lines, self.k, self.m,
            self.a_row, self.a_step, self.a_line, self.a_k_line, self.b_row, self.c_row,
            self.c_line, self.start_row, self.start_line, int(self.bounds != UNBOUNDED),
            float(self.bounds[0]), float(self.bounds[1]),
        )  # fmt: skip


def slots(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, start: np.ndarray,
    bounds: tuple[float, float] = UNBOUNDED,
) -> list[Any]:  # fmt: skip
    """The argument block of a plain product of arrays, any of which may be a view."""
    n, k = a.shape
    size, start_row = a.itemsize, 0 if start.ndim == 1 else start.strides[0]
    a_row, a_step = (size, a.strides[1]) if a.strides[0] == size else (a.strides[0], size)
    return list(
        Product(
            a, b, c, start, n, k, c.shape[1], a_row, a_step, b.strides[0], c.strides[0],
            start_row=start_row, bounds=bounds,
        ).slots
    )  # fmt: skip


def reference(
    numbers: Numbers, a: np.ndarray, b: np.ndarray, start: np.ndarray,
    bounds: tuple[float, float] = UNBOUNDED,
) -> np.ndarray:  # fmt: skip
    """What a chip makes of [n, k] and [k, m]: [n, m], as it is stored."""
    of = numbers.arithmetic
    a, b = of.operand(a), of.operand(b)
    sums = np.broadcast_to(of.operand(start), (a.shape[0], b.shape[1]))
    for i in range(a.shape[1]):
        sums = of.fma(a[:, i : i + 1], b[i], sums)
    return numbers.stored(bounded(numbers, sums, bounds))


_SHAPES = ((1, 1, 8), (5, 7, 8), (4, 16, 32), (7, 33, 19), (3, 9, 13), (2, 5, 3))
_DATA: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    # Products that are no normal numbers, and sums that are none.
    "small": lambda rng, shape: rng.standard_normal(shape) * 2.0**-12,
    "large": lambda rng, shape: rng.uniform(0, 200, shape),
    "not finite": lambda rng, shape: rng.choice([1, -1, 30, np.inf, -np.inf, np.nan], shape),
}


def _cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    numbers, dtype = numbers_of(target, kind), dtype_of(kind)
    for what, draw in _DATA.items():
        for n, k, m in _SHAPES:
            for turned in (False, True):
                a = draw(rng, (k, n) if turned else (n, k)).astype(dtype)
                a = a.T if turned else a
                b, start = draw(rng, (k, m)).astype(dtype), draw(rng, (m,)).astype(dtype)
                bounds = UNBOUNDED if turned else (0.0, 6.0)
                c = np.zeros((n, m), dtype)
                expected = reference(numbers, a, b, start, bounds)
                label = f"{n}x{k}x{m} {what}{' turned' * turned}"
                yield Case(slots(a, b, c, start, bounds), [(c, expected)], 0, label)


def variant(kind: Kind, rows: int, vectors: int) -> str:
    """The kernel whose blocks of sums have so many rows of 1 or 2 vectors."""
    return f"matmul_{kind}_{rows}x{vectors}"


def _build(kind: Kind, block: tuple[int, int] | None, target: Target) -> KernelFunction:
    return _product(numbers_of(target, kind), *(block or _block(target)))


def all_kernels() -> list[Kernel]:
    """For each kind of number a product whose blocks fit a target's registers, and others."""
    blocks: list[tuple[str, Kind, tuple[int, int] | None]] = [
        (name, kind, None) for kind, name in NAMES.items()
    ]
    blocks += [(variant("half", *block), "half", block) for block in VARIANTS]
    return [
        Kernel(
            name,
            partial(_build, kind, block),
            (__name__, numbers_of.__module__),
            partial(_cases, kind),
        )
        for name, kind, block in blocks
    ]
