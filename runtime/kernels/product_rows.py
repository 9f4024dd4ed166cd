"""Products of two batches of float32 matrices, both of which come at run time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.convolution import FEW, pixels_at_once
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_f32,
    by_token,
    fma_outer,
    load_f32,
    smaller,
    store_f32_grid,
    with_lanes,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def _kernel(target: Target) -> KernelFunction:
    """y[i] = a[i] b[i] of matrices whose rows are padded to 16 columns.

    Slots: 0 a, 1 b, 2 y, 3 products i, 4 rows of a, 5 columns of a and rows of b, 6 columns of b
    with their pad, 7 to 9 bytes between rows of a, b and y, 10 to 12 between their matrices (0:
    one for all). Threads share products and columns.
    """
    tiles, most = target.gemm_tiles, pixels_at_once(target)
    lanes = target.lanes("f32")
    wide = lanes * 4

    def of(count: int, at_once: int) -> Any:
        sums = count * at_once

        def some(a: Any, a_step: Any, b: Any, b_step: Any, inner: Any, y: Any, y_step: Any) -> None:
            acc = zeros_f32(sums)
            left = inner
            while left >= 4:  # addresses of rows are formed once for four terms
                acc = fma_outer(load_f32(b, at_once, wide), bcast_f32(a, count, a_step), acc)
                b = b + b_step
                acc = fma_outer(load_f32(b, at_once, wide), bcast_f32(a + 4, count, a_step), acc)
                b = b + b_step
                acc = fma_outer(load_f32(b, at_once, wide), bcast_f32(a + 8, count, a_step), acc)
                b = b + b_step
                acc = fma_outer(load_f32(b, at_once, wide), bcast_f32(a + 12, count, a_step), acc)
                b = b + b_step
                a = a + 16
                left -= 4
            while left > 0:
                acc = fma_outer(load_f32(b, at_once, wide), bcast_f32(a, count, a_step), acc)
                a = a + 4
                b = b + b_step
                left -= 1
            store_f32_grid(y, by_token(acc), count, wide, y_step)

        return some

    def all_rows(at_once: int) -> Any:
        many, few, one = of(most, at_once), of(FEW, at_once), of(1, at_once)

        def some(
            a: Any, a_step: Any, b: Any, b_step: Any, inner: Any, y: Any, y_step: Any, rows: Any
        ) -> None:
            left = rows
            while left > 0:
                n = 1
                if left >= most:
                    n = most
                    many(a, a_step, b, b_step, inner, y, y_step)
                elif left >= FEW:
                    n = FEW
                    few(a, a_step, b, b_step, inner, y, y_step)
                else:
                    one(a, a_step, b, b_step, inner, y, y_step)
                a = a + n * a_step
                y = y + n * y_step
                left -= n

        return some

    several, alone = all_rows(tiles), all_rows(1)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        rows = arg_int(args, 4)
        inner = arg_int(args, 5)
        vectors = arg_int(args, 6) // lanes
        a_step = arg_int(args, 7)
        b_step = arg_int(args, 8)
        y_step = arg_int(args, 9)
        across = (vectors + tiles - 1) // tiles
        units = arg_int(args, 3) * across
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            i = u // across
            v = (u - i * across) * tiles
            a = arg_ptr(args, 0) + i * arg_int(args, 10)
            b = arg_ptr(args, 1) + i * arg_int(args, 11) + v * wide
            y = arg_ptr(args, 2) + i * arg_int(args, 12) + v * wide
            if tiles > 1 and v + tiles <= vectors:
                several(a, a_step, b, b_step, inner, y, y_step, rows)
            else:
                for j in range(smaller(vectors - v, tiles)):
                    alone(a, a_step, b + j * wide, b_step, inner, y + j * wide, y_step, rows)

    return with_lanes(kernel, lanes)


# Products, rows, inner length, columns, and whether each product has its own a and b.
_SHAPES = ((1, 1, 3, 10, 1, 1), (3, 21, 37, 50, 1, 1), (2, 6, 16, 16, 0, 1), (2, 9, 5, 33, 1, 0))


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for count, rows, inner, columns, each_a, each_b in _SHAPES:
        a_padded, padded = (-(-n // 16) * 16 for n in (inner, columns))
        a = rng.standard_normal((count if each_a else 1, rows, a_padded)).astype(np.float32)
        b = np.zeros((count if each_b else 1, inner, padded), np.float32)
        b[..., :columns] = rng.standard_normal((*b.shape[:2], columns))
        y = np.full((count, rows, padded), np.nan, np.float32)
        exact = a[..., :inner].astype(np.float64) @ b
        size = np.abs(a[..., :inner]).astype(np.float64) @ np.abs(b)
        slots = [
            a, b, y, count, rows, inner, padded, a_padded * 4, padded * 4, padded * 4,
            each_a * a[0].nbytes, each_b * b[0].nbytes, y[0].nbytes,
        ]  # fmt: skip
        label = f"{count} of {rows}x{inner}x{columns}"
        yield Case(slots, [(y, exact.astype(np.float32))], size * (inner + 1) * 2.0**-24, label)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.convolution")
    return [Kernel("product_rows_f32", _kernel, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
