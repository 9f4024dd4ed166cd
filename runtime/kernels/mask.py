"""What attention adds to scores, out of the ones and zeros that say which tokens there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    f32,
    get_i32,
    get_i64,
    get_u8,
    larger,
    put_f32,
    smaller,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


# What y is.
PRODUCT, CHOICE, BEFORE, BEFORE_SUM, BEFORE_ONES = range(5)


def _integer(at: Any, wide: Any) -> Any:
    """One of so many bytes; a single byte has no sign."""
    found = 0
    if wide == 8:
        found = found + get_i64(at)
    if wide == 4:
        found = found + get_i32(at)
    if wide == 1:
        found = found + get_u8(at)
    return found


def rows_of_mask(args: Any, thread: Any, n_threads: Any) -> None:
    """y[r][c] out of x: a product, or one of two numbers. Threads share the elements.

    Slots: 0 x [rows][keys], 1 y [rows][padded], whose pad is 0, 2 rows, 3 keys, 4 padded (to 16),
    5 bytes between elements of x, 6 bytes that are read of each (1: unsigned; 4, 8), 7 what y is,
    8 sign, 9 shift, 10 first, 11 second. PRODUCT: (sign x + shift) first. CHOICE: first where
    sign x + shift is not zero, else second. BEFORE: first where c < x[r], of x [rows], else second;
    BEFORE_SUM: the same of the sum of x[r], modulo 2^32; BEFORE_ONES: of how many of x[r] are 1.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    rows = arg_int(args, 2)
    keys = arg_int(args, 3)
    padded = arg_int(args, 4)
    step = arg_int(args, 5)
    wide = arg_int(args, 6)
    form = arg_int(args, 7)
    sign = arg_float(args, 8)
    shift = arg_float(args, 9)
    first = arg_float(args, 10)
    second = arg_float(args, 11)
    begin = rows * padded * thread // n_threads
    end = rows * padded * (thread + 1) // n_threads
    for r in range(begin // padded, (end + padded - 1) // padded):
        count = 0
        if form == BEFORE:
            count = count + _integer(x + r * step, wide)
        if form == BEFORE_SUM:
            for c in range(keys):
                count = count + _integer(x + (r * keys + c) * step, wide)
            count = ((count + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
        if form == BEFORE_ONES:
            for c in range(keys):
                if _integer(x + (r * keys + c) * step, wide) == 1:
                    count += 1
        for i in range(larger(begin, r * padded), smaller(end, (r + 1) * padded)):
            c = i - r * padded
            made = f32(0)
            if c < keys:
                made = second
                if form >= BEFORE:
                    if c < count:
                        made = first
                else:
                    moved = f32(_integer(x + (r * keys + c) * step, wide)) * sign + shift
                    if form == PRODUCT:
                        made = moved * first
                    elif moved != f32(0):
                        made = first
            put_f32(y + i * 4, made)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    least = float(np.finfo(np.float32).min)
    dtype: Any
    for rows, keys, dtype, read, form, numbers in (
        (1, 16, np.int64, 8, PRODUCT, (-1.0, 1.0, least, 0.0)),
        (3, 37, np.int32, 4, PRODUCT, (-1.0, 1.0, -10000.0, 0.0)),
        (2, 5, np.int64, 4, CHOICE, (1.0, 0.0, 0.0, least)),
        (2, 19, np.bool_, 1, CHOICE, (-1.0, 1.0, least, 0.5)),
        (3, 21, np.int32, 4, BEFORE, (1.0, 0.0, 0.0, -10000.0)),
        (2, 33, np.int64, 4, BEFORE_SUM, (1.0, 0.0, 0.0, least)),
        (3, 18, np.int32, 4, BEFORE_ONES, (1.0, 0.0, 0.0, least)),
    ):
        x = rng.integers(0, 2, (rows, keys)).astype(dtype)
        if read == np.dtype(dtype).itemsize > 1 and form < BEFORE:
            x[-1, -3:] = np.iinfo(dtype).min, np.iinfo(dtype).max, -(1 << 24) - 1
        if form == BEFORE:
            x = np.array([0, keys, 7], dtype)
        if form == BEFORE_ONES:
            x[:, ::5] = 2
        if read == 4 < np.dtype(dtype).itemsize:
            x[0, :2] = 1 << 32, (1 << 32) - 1  # of which the low half counts
        y = np.full((rows, -(-keys // 16) * 16), np.nan, np.float32)
        sign, shift, first, second = numbers
        seen: Any = x.astype(np.int32) if read == 4 else x
        moved = seen.astype(np.float32) * np.float32(sign) + np.float32(shift)
        chosen = moved != 0
        if form >= BEFORE:
            ones = seen == 1 if form == BEFORE_ONES else seen
            counts = seen if form == BEFORE else ones.sum(1, dtype=np.int32)
            chosen = np.arange(keys) < counts[:, None]
        with np.errstate(over="ignore"):
            products = moved * np.float32(first)
        choices = np.where(chosen, np.float32(first), np.float32(second))
        expected = np.zeros_like(y)
        expected[:, :keys] = products if form == PRODUCT else choices
        slots = [x, y, rows, keys, y.shape[1], x.itemsize, read, form, *numbers]
        yield Case(slots, [(y, expected)], 0, f"{rows}x{keys} {x.dtype}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [Kernel("rows_of_mask", same_for_all(rows_of_mask), (__name__,), _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
