"""Rows out of a table of numbers or bytes, and rows that others of their number are added to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    get_i32,
    get_i64,
    larger,
    load_f32,
    load_i8_i32,
    load_u8_i32,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    to_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def _entry(ids: Any, r: Any, wide: Any, entries: Any) -> Any:
    """The entry that an id says."""
    index = 0
    if wide == 8:
        index = index + get_i64(ids + r * 8)
    if wide == 4:
        index = index + get_i32(ids + r * 4)
    if index < 0:
        index = index + entries
    return smaller(larger(index, 0), entries - 1)


def gather(args: Any, thread: Any, n_threads: Any) -> None:
    """y[r] = table[ids[r]]; ids below 0 count from the end. Threads share the rows.

    Slots: 0 table [entries][padded], 1 ids (int32 or int64), 2 y [rows][padded], 3 rows, 4 padded
    (to 16), 5 entries, 6 bytes of an id. Ids are checked before; those that are none give some
    entry.
    """
    table = arg_ptr(args, 0)
    ids = arg_ptr(args, 1)
    y = arg_ptr(args, 2)
    rows = arg_int(args, 3)
    padded = arg_int(args, 4)
    entries = arg_int(args, 5)
    wide = arg_int(args, 6)
    for r in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        row = table + _entry(ids, r, wide, entries) * padded * 4
        for c in range(0, padded, 16):
            store_f32(y + (r * padded + c) * 4, load_f32(row + c * 4, 1, 0), 0)


def gather_bytes(args: Any, thread: Any, n_threads: Any) -> None:
    """y[r] = (table[ids[r]] - zero) * scale, of a table of bytes. Threads share the rows.

    Slots: 0 to 6 as of `gather`, but table of int8 or uint8, 7 whether it is int8, 8 scale,
    9 zero point.
    """
    table = arg_ptr(args, 0)
    ids = arg_ptr(args, 1)
    y = arg_ptr(args, 2)
    rows = arg_int(args, 3)
    padded = arg_int(args, 4)
    entries = arg_int(args, 5)
    wide = arg_int(args, 6)
    signed = arg_int(args, 7)
    scale = arg_float(args, 8)
    zero = arg_int(args, 9)
    for r in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        row = table + _entry(ids, r, wide, entries) * padded
        for c in range(0, padded, 16):
            codes = load_u8_i32(row + c, 1, 0)
            if signed != 0:
                codes = load_i8_i32(row + c, 1, 0)
            value = to_f32(codes - splat_i32(zero)) * splat_f32(scale)
            store_f32(y + (r * padded + c) * 4, value, 0)


def add_rows(args: Any, thread: Any, n_threads: Any) -> None:
    """y = a + b, of which b is there again and again. Threads share the vectors.

    Slots: 0 a, 1 b, 2 y, 3 vectors of a, 4 vectors of b.
    """
    a = arg_ptr(args, 0)
    b = arg_ptr(args, 1)
    y = arg_ptr(args, 2)
    n = arg_int(args, 3)
    period = arg_int(args, 4)
    first = n * thread // n_threads
    at = first % period
    for v in range(first, n * (thread + 1) // n_threads):
        store_f32(y + v * 64, load_f32(a + v * 64, 1, 0) + load_f32(b + at * 64, 1, 0), 0)
        at += 1
        if at == period:
            at = 0


def _gather_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for entries, padded, rows, dtype in ((7, 32, 9, np.int64), (1, 16, 3, np.int32)):
        table = rng.standard_normal((entries, padded)).astype(np.float32)
        ids = rng.integers(-entries, entries, rows).astype(dtype)
        ids[0], ids[-1] = -entries, entries - 1
        y = np.full((rows, padded), np.nan, np.float32)
        slots = [table, ids, y, rows, padded, entries, ids.itemsize]
        yield Case(slots, [(y, table[ids])], 0, f"{rows} of {entries}x{padded}")


def _gather_bytes_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for entries, padded, rows, dtype, zero, least in (
        (7, 32, 9, np.int64, 0, -128),
        (5, 48, 4, np.int32, 255, 0),
        (1, 16, 3, np.int64, -128, -128),
    ):
        table = rng.integers(least, least + 256, (entries, padded))
        table[0, :2] = least, least + 255
        codes = table.astype(np.int8 if least else np.uint8)
        ids = rng.integers(-entries, entries, rows).astype(dtype)
        ids[0], ids[-1] = -entries, entries - 1
        y, scale = np.full((rows, padded), np.nan, np.float32), np.float32(0.0123)
        more = [ids.itemsize, -least // 128, float(scale), zero]
        slots = [codes, ids, y, rows, padded, entries, *more]
        expected = (table[ids] - zero).astype(np.float32) * scale
        yield Case(slots, [(y, expected)], 0, f"{rows} of {entries}x{padded} {codes.dtype}")


def _add_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for count, period in ((12, 4), (5, 5), (3, 1)):
        a = rng.standard_normal((count // period, period, 16)).astype(np.float32)
        b = rng.standard_normal((period, 16)).astype(np.float32)
        y = np.full_like(a, np.nan)
        yield Case([a, b, y, count, period], [(y, a + b)], 0, f"{period} in {count}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows = (
        ("rows_f32_gather", gather, _gather_cases),
        ("rows_byte_gather", gather_bytes, _gather_bytes_cases),
        ("rows_f32_add", add_rows, _add_cases),
    )
    return [
        Kernel(name, same_for_all(fn), (__name__,), cases, __name__) for name, fn, cases in rows
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
