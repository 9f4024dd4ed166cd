"""Transposed matrices, one after the other: weights as gradients of what they read want them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.numbers import KINDS, Kind, dtype_of
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    get_i32,
    get_u16,
    ptr_to_int,
    put_i32,
    put_u16,
)
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

NAMES: dict[Kind, str] = {kind: f"turn_{kind}" for kind in KINDS}


@dataclass(frozen=True)
class Turned:
    """Addresses and shape; distances in bytes.

    Attributes:
        source, to: addresses.
        lines, taps: so many lines of so many matrices.
        n, m: rows and columns of each; `to` has [lines, taps, m, n] in one piece.
        line, tap, row: from line to line of the source, from matrix to matrix, from row to row;
            elements of a row lie side by side.
    """

    source: Any
    to: Any
    lines: int
    taps: int
    n: int
    m: int
    line: int
    tap: int
    row: int

    @property
    def slots(self) -> tuple[Any, ...]:
        """The argument block."""
        return tuple(getattr(self, one.name) for one in fields(self))


def _kernel(kind: Kind) -> KernelFunction:
    get, put = (get_u16, put_u16) if kind == "half" else (get_i32, put_i32)
    size = dtype_of(kind).itemsize

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        o, source, to = args, arg_ptr(args, 0), arg_ptr(args, 1)
        n, m, row = arg_int(args, 4), arg_int(args, 5), arg_int(args, 8)
        line = o + arg_int(args, 2)
        while ptr_to_int(line) != ptr_to_int(o):
            at, tap = source, o + arg_int(args, 3)
            while ptr_to_int(tap) != ptr_to_int(o):
                column = at
                while ptr_to_int(column) != ptr_to_int(at + m * size):
                    p, left = column, o + (n >> 2)
                    while ptr_to_int(left) != ptr_to_int(o):
                        put(to, get(p))
                        put(to + size, get(p + row))
                        put(to + 2 * size, get(p + 2 * row))
                        put(to + 3 * size, get(p + 3 * row))
                        p, to, left = p + 4 * row, to + 4 * size, left + -1
                    left = o + (n & 3)
                    while ptr_to_int(left) != ptr_to_int(o):
                        put(to, get(p))
                        p, to, left = p + row, to + size, left + -1
                    column = column + size
                at, tap = at + arg_int(args, 7), tap + -1
            source, line = source + arg_int(args, 6), line + -1

    return kernel


def _cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for lines, taps, n, m in ((1, 1, 5, 3), (2, 3, 8, 2), (3, 1, 1, 9)):
        source = rng.standard_normal((lines, taps, n, m)).astype(dtype_of(kind))
        expected = np.ascontiguousarray(source[::-1, ::-1].transpose(0, 1, 3, 2))
        to = np.zeros_like(expected)
        block = Turned(
            source[-1, -1], to, lines, taps, n, m, -source.strides[0], -source.strides[1],
            source.strides[2],
        )  # fmt: skip
        yield Case(list(block.slots), [(to, expected)], 0, f"{lines}x{taps} {n}x{m}")


def all_kernels() -> list[Kernel]:
    """One for each kind of number."""
    return [
        Kernel(name, same_for_all(_kernel(kind)), (__name__,), partial(_cases, kind))
        for kind, name in NAMES.items()
    ]
