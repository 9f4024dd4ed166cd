"""A copy of an image, or of some of its rows, with zeros around it: what windows reach beyond it.

What is written are whole vectors from the begin to the end: 16 bytes behind it may be written too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.numbers import KINDS, Kind, dtype_of, numbers_of
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    load_f32,
    load_half,
    ptr_to_int,
    store_f32,
    store_half,
    with_lanes,
    zeros_f32,
    zeros_half,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAMES: dict[Kind, str] = {kind: f"pad_{kind}" for kind in KINDS}
SLACK = 16  # bytes behind what is written


def _pad(kind: Kind, lanes: int) -> KernelFunction:
    # Halves are moved as they are, also where none are computed with.
    load, store, zeros = (
        (load_half, store_half, zeros_half) if kind == "half" else (load_f32, store_f32, zeros_f32)
    )
    size = dtype_of(kind).itemsize
    width = lanes * size

    def fill(to: Any, end: Any) -> None:
        while ptr_to_int(to) < ptr_to_int(end):
            store(to, zeros(1), 0)
            to = to + width

    def copy(to: Any, end: Any, source: Any) -> None:
        while ptr_to_int(to) < ptr_to_int(end):
            store(to, load(source, 1, 0), 0)
            to, source = to + width, source + width

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        source, to = arg_ptr(args, 0), arg_ptr(args, 1)
        n, source_row = arg_int(args, 3), arg_int(args, 4)
        left, right = arg_int(args, 5), arg_int(args, 6)
        row = left + n + right
        fill(to, to + arg_int(args, 7) * row)
        to = to + arg_int(args, 7) * row
        end = to + arg_int(args, 2) * row
        while ptr_to_int(to) != ptr_to_int(end):
            fill(to, to + left)
            copy(to + left, to + (left + n), source)
            fill(to + (left + n), to + row)
            to, source = to + row, source + source_row
        fill(to, to + arg_int(args, 8) * row)

    return with_lanes(kernel, lanes)


def slots(
    source: Any, to: Any, rows: int, row_bytes: int, source_row: int,
    sides: tuple[int, int], lines: tuple[int, int],
) -> list[Any]:  # fmt: skip
    """The argument block.

    Args:
        source, to: addresses.
        rows, row_bytes: of the image; rows lie `source_row` bytes apart.
        sides: bytes of zeros to the left and right.
        lines: rows of zeros above and below.
    """
    return [source, to, rows, row_bytes, source_row, *sides, *lines]


def _cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    dtype = dtype_of(kind)
    size = dtype.itemsize
    for rows, n, sides, lines in (
        (3, 5, (2, 1), (1, 2)),
        (2, 33, (0, 0), (0, 0)),
        (1, 16, (8, 3), (0, 1)),
    ):
        whole = sides[0] + n + sides[1]
        source = rng.standard_normal((rows, n)).astype(dtype)
        expected = np.zeros((sum(lines) + rows, whole), dtype)
        expected[lines[0] : lines[0] + rows, sides[0] : sides[0] + n] = source
        to = np.zeros(expected.nbytes + SLACK, np.uint8)
        found = to[: expected.nbytes].view(dtype).reshape(expected.shape)
        block = slots(
            source, to, rows, n * size, source.strides[0],
            (sides[0] * size, sides[1] * size), lines,
        )  # fmt: skip
        yield Case(block, [(found, expected)], 0, f"{rows}x{n} {sides} {lines}")


def _build(kind: Kind, target: Target) -> KernelFunction:
    vectors = target.vector_bytes == 16
    return _pad(kind, 16 // dtype_of(kind).itemsize if vectors else 4)


def all_kernels() -> list[Kernel]:
    """One copy for each kind of number."""
    return [
        Kernel(
            name,
            partial(_build, kind),
            (__name__, numbers_of.__module__),
            partial(_cases, kind),
        )
        for kind, name in NAMES.items()
    ]
