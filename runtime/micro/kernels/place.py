"""Copies of rows of bytes to where other rows are around them, and bytes that are all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.micro.kernels.copying import four_times
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bits_u8,
    get_u8,
    int32,
    load_u8,
    ptr_to_int,
    put_u8,
    splat_i32,
    store_u8,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

PLACE, FILL = "place", "fill"
_PIECE, _LANES = 16, 4


def _place(args: Any, thread: Any, n_threads: Any) -> None:
    source, to = arg_ptr(args, 0), arg_ptr(args, 1)
    rows, n = int32(arg_int(args, 2)), int32(arg_int(args, 3))
    source_row, to_row = int32(arg_int(args, 4)), int32(arg_int(args, 5))
    whole = n & int32(-_PIECE)
    while rows != 0:
        at, put_at, middle, end = source, to, ptr_to_int(source + whole), ptr_to_int(source + n)
        while ptr_to_int(at) != middle:
            store_u8(put_at, load_u8(at, 1, 0))
            at, put_at = at + _PIECE, put_at + _PIECE
        while ptr_to_int(at) != end:
            put_u8(put_at, get_u8(at))
            at, put_at = at + 1, put_at + 1
        source, to, rows = source + source_row, to + to_row, rows - int32(1)


def _fill(args: Any, thread: Any, n_threads: Any) -> None:
    to, n, word = arg_ptr(args, 0), int32(arg_int(args, 1)), arg_int(args, 2)
    middle, end = ptr_to_int(to + (n & int32(-_PIECE))), ptr_to_int(to + n)
    while ptr_to_int(to) != middle:
        store_u8(to, bits_u8(splat_i32(word)))
        to = to + _PIECE
    while ptr_to_int(to) != end:
        put_u8(to, word & 255)
        to = to + 1


def _place_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    shapes = ((1, 7, 7, 7), (5, 3, 3, 8), (4, 37, 40, 61), (3, 16, 16, 20))
    for rows, n, source_row, to_row in shapes:
        source = rng.integers(0, 256, rows * source_row, np.uint8)
        to = rng.integers(0, 256, rows * to_row, np.uint8)
        expected = to.copy()
        for row in range(rows):
            taken = source[row * source_row : row * source_row + n]
            expected[row * to_row : row * to_row + n] = taken
        block = [source, to, rows, n, source_row, to_row]
        yield Case(block, [(to, expected)], 0, f"{rows}x{n}")


def _fill_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n, code in ((1, 3), (16, -128), (77, -7), (40, 0)):
        to = np.zeros(n + 3, np.int8)
        expected = np.concatenate([np.full(n, code), np.zeros(3)]).astype(np.int8)
        yield Case([to, n, four_times(code)], [(to, expected)], 0, f"{n} times {code}")


def all_kernels() -> list[Kernel]:
    """Each for all chips."""
    return [
        Kernel(PLACE, same_for_all(with_lanes(_place, _LANES)), (__name__,), _place_cases),
        Kernel(FILL, same_for_all(with_lanes(_fill, _LANES)), (__name__,), _fill_cases),
    ]
