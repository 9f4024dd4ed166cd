"""Functions of single int8 codes, by a table of 256."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.targets.simd import arg_int, arg_ptr, get_i8, get_u8, int32, ptr_to_int, put_u8
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

NAME = "lookup_i8"


def _kernel(args: Any, thread: Any, n_threads: Any) -> None:
    codes, table, made = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
    # The table begins with the code -128.
    middle, end = table + 128, ptr_to_int(codes + int32(arg_int(args, 3)))
    while ptr_to_int(codes) != end:
        put_u8(made, get_u8(middle + int32(get_i8(codes))))
        codes, made = codes + 1, made + 1


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    codes = np.concatenate([np.arange(-128, 128), rng.integers(-128, 128, 77)]).astype(np.int8)
    table = rng.integers(-128, 128, 256).astype(np.int8)
    expected = table[codes.astype(int) + 128]
    made = np.zeros_like(codes)
    yield Case([codes, table, made, len(codes)], [(made, expected)], 0, "random")
    same = codes.copy()
    yield Case([same, table, same, len(codes)], [(same, expected)], 0, "in place")


def all_kernels() -> list[Kernel]:
    """One for all chips."""
    return [Kernel(NAME, same_for_all(_kernel), (__name__,), _cases)]
