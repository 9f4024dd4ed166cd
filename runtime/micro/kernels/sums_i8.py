"""Sums of products of a row of signed bytes with rows of weights, int32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    dot_sum,
    get_i8,
    get_i32,
    int32,
    load_u8,
    ptr_to_int,
    put_i32,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

NAME = "sums_i8"
_PIECE, _LANES = 16, 4


def _kernel(args: Any, thread: Any, n_threads: Any) -> None:
    x, w, bias, c = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_ptr(args, 3)
    m, k = int32(arg_int(args, 4)), int32(arg_int(args, 5))
    while m != 0:
        total = int32(get_i32(bias))
        at, whole, end = x, ptr_to_int(x + (k & int32(-_PIECE))), ptr_to_int(x + k)
        while ptr_to_int(at) != whole:
            total = dot_sum(total, load_u8(at, 1, 0), load_u8(w, 1, 0))
            at, w = at + _PIECE, w + _PIECE
        rest = int32(0)
        while ptr_to_int(at) != end:
            rest += int32(get_i8(at)) * int32(get_i8(w))
            at, w = at + 1, w + 1
        put_i32(c, total + rest)
        bias, c, m = bias + 4, c + 4, m - int32(1)


def reference(x: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """int32 [m] of int8 [k] and [m, k], int32 [m]."""
    sums: np.ndarray = weights.astype(np.int64) @ x.astype(np.int64) + bias
    return sums.astype(np.int32)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for m, k in ((1, 1), (3, 16), (5, 40), (2, 131)):
        x, w = (rng.integers(-128, 128, shape).astype(np.int8) for shape in (k, (m, k)))
        bias, c = rng.integers(-(2**24), 2**24, m).astype(np.int32), np.zeros(m, np.int32)
        yield Case([x, w, bias, c, m, k], [(c, reference(x, w, bias))], 0, f"{m}x{k}")


def all_kernels() -> list[Kernel]:
    """One for all chips."""
    return [Kernel(NAME, same_for_all(with_lanes(_kernel, _LANES)), (__name__,), _cases)]
