"""Functions of single int8 codes as float32, by a table of 256.

There is nothing of floats in it, so that chips without a floating-point unit do it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.targets.simd import arg_int, arg_ptr, get_i8, get_i32, int32, ptr_to_int, put_i32
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

NAME = "lookup_single"


def _kernel(args: Any, thread: Any, n_threads: Any) -> None:
    codes, table, made = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
    # The table begins with the code -128.
    middle, end = table + 512, ptr_to_int(codes + int32(arg_int(args, 3)))
    while ptr_to_int(codes) != end:
        put_i32(made, get_i32(middle + (int32(get_i8(codes)) << 2)))
        codes, made = codes + 1, made + 4


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    codes = np.concatenate([np.arange(-128, 128), rng.integers(-128, 128, 77)]).astype(np.int8)
    table = rng.standard_normal(256).astype(np.float32)
    made = np.zeros(len(codes), np.float32)
    expected = table[codes.astype(int) + 128]
    yield Case([codes, table, made, len(codes)], [(made, expected)], 0, "random")


def all_kernels() -> list[Kernel]:
    """One for all chips."""
    return [Kernel(NAME, same_for_all(_kernel), (__name__,), _cases)]
