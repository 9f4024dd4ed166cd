"""Pixels, channels of rows, or runs of them, from other places: pads, slices, rows by number.

Tables of places are int32; what is below 0 is no place, and gets what is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    f32,
    get_f32,
    get_i32,
    load_f32,
    put_f32,
    store_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

NOWHERE = -1  # in a table
_FOUR = 64  # channels that are moved at a time


def take(args: Any, thread: Any, n_threads: Any) -> None:
    """y[i, j, k] = x[a[i], b[j], c[k]], pixel by pixel. Threads share the rows of y.

    Slots: 0 x, 1 y, 2 to 4 tables a, b and c of images, rows and columns, 5 what pixels from
    nowhere are, 6 to 8 images, rows and columns of y, 9 and 10 rows and columns of x, 11 vectors of
    16 of a pixel, 12 and 13 bytes between pixels of x and y.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    columns = arg_ptr(args, 4)
    given = arg_ptr(args, 5)
    height = arg_int(args, 7)
    width = arg_int(args, 8)
    vectors = arg_int(args, 11)
    x_step = arg_int(args, 12)
    y_step = arg_int(args, 13)
    n = arg_int(args, 6) * height
    for row in range(n * thread // n_threads, n * (thread + 1) // n_threads):
        image = row // height
        i = get_i32(arg_ptr(args, 2) + image * 4)
        j = get_i32(arg_ptr(args, 3) + (row - image * height) * 4)
        source = x + (i * arg_int(args, 9) + j) * arg_int(args, 10) * x_step
        for k in range(width):
            column = get_i32(columns + k * 4)
            to = y + (row * width + k) * y_step
            if i < 0 or j < 0 or column < 0:
                for v in range(vectors):
                    store_f32(to + v * 64, load_f32(given + v * 64, 1, 0), 0)
            else:
                p = source + column * x_step
                for v in range(vectors):
                    store_f32(to + v * 64, load_f32(p + v * 64, 1, 0), 0)


def take_channels(args: Any, thread: Any, n_threads: Any) -> None:
    """y[r, c] = x[r, a[c]]; pads of y become zero. Threads share the rows, or parts of them.

    Slots: 0 x, 1 y, 2 table a, 3 what channels from nowhere are (float32), 4 rows, 5 channels of
    y, 6 bytes between rows of x, 7 between those of y, of which so many are written.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    table = arg_ptr(args, 2)
    given = arg_float(args, 3)
    channels = arg_int(args, 5)
    x_step = arg_int(args, 6)
    padded = arg_int(args, 7) // 4
    parts = padded // 16
    n = arg_int(args, 4) * parts
    for i in range(n * thread // n_threads, n * (thread + 1) // n_threads):
        row = i // parts
        first = (i - row * parts) * 16
        for c in range(first, first + 16):
            value = f32(0.0)
            if c < channels:
                at = get_i32(table + c * 4)
                value = given
                if at >= 0:
                    value = get_f32(x + (row * x_step + at * 4))
            put_f32(y + (row * padded + c) * 4, value)


def take_runs(args: Any, thread: Any, n_threads: Any) -> None:
    """Run j of row r of y is the one at float a[r, j] of x; pads of y become zero.

    Slots: 0 x, 1 y, 2 table a (from nowhere: zeros), 3 rows and 4 runs of each row of y, 5 channels
    of a run, 6 bytes between rows of y. Threads share the rows.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    table = arg_ptr(args, 2)
    rows = arg_int(args, 3)
    runs = arg_int(args, 4)
    run = arg_int(args, 5)
    y_step = arg_int(args, 6)
    fours = run // _FOUR * _FOUR
    whole = run // 16 * 16
    for r in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        to = y + r * y_step
        for j in range(runs):
            at = get_i32(table + (r * runs + j) * 4)
            q = to + j * run * 4
            if at < 0:
                for c in range(run):
                    put_f32(q + c * 4, 0.0)
            else:
                p = x + at * 4
                for c in range(0, fours, _FOUR):
                    store_f32(q + c * 4, load_f32(p + c * 4, 4, 64), 64)
                for c in range(fours, whole, 16):
                    store_f32(q + c * 4, load_f32(p + c * 4, 1, 0), 0)
                for c in range(whole, run):
                    put_f32(q + c * 4, get_f32(p + c * 4))
        for c in range(runs * run, y_step // 4):
            put_f32(to + c * 4, 0.0)


# --- references and cases -------------------------------------------------------------------------


def _take_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (read, written) in enumerate((((2, 3, 5), (3, 4, 7)), ((1, 1, 1), (2, 1, 3)))):
        vectors, more = 1 + i, 16 * i
        x = rng.standard_normal((*read, 16 * vectors + more)).astype(np.float32)
        given = rng.standard_normal(16 * vectors).astype(np.float32)
        tables = [
            rng.integers(NOWHERE, size, n).astype(np.int32)
            for size, n in zip(read, written, strict=True)
        ]
        tables[-1][-1] = NOWHERE
        expected = x[..., : 16 * vectors][np.ix_(*tables)]
        expected[np.logical_or.outer(np.logical_or.outer(*(t < 0 for t in tables[:2])),
                                     tables[2] < 0)] = given  # fmt: skip
        y = np.full((*written, 16 * vectors), np.nan, np.float32)
        slots = [
            x, y, *tables, given, *written, *read[1:], vectors, x.strides[2], 64 * vectors
        ]  # fmt: skip
        yield Case(slots, [(y, expected)], 0, f"{written} of {read}")


def _channel_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for rows, read, written in ((1, 37, 50), (3, 16, 1), (2, 1, 32)):
        x = rng.standard_normal((rows, -(-read // 16) * 16)).astype(np.float32)
        table = rng.integers(NOWHERE, read, written).astype(np.int32)
        table[0], table[-1] = read - 1, NOWHERE
        y = np.full((rows, -(-written // 16) * 16), np.nan, np.float32)
        expected = np.zeros_like(y)
        expected[:, :written] = np.where(table < 0, np.float32(2.5), x[:, table])
        slots = [x, y, table, 2.5, rows, written, x.strides[0], y.strides[0]]
        yield Case(slots, [(y, expected)], 0, f"{rows}x{written} of {read}")


def _run_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for read, runs, run in (((7, 1), (5, 2), 100), ((3, 3), (4, 1), 16), ((4, 2), (1, 9), 7)):
        step, y_step = (-(-n * run // 16) * 16 for n in (read[1], runs[1]))
        x = np.full((read[0], step), np.nan, np.float32)
        x[:, : read[1] * run] = rng.standard_normal((read[0], read[1] * run))
        x[-1, read[1] * run - 1] = np.inf
        rows, places = rng.integers(0, read[0], runs), rng.integers(0, read[1], runs)
        rows[-1, -1], places[-1, -1] = read[0] - 1, read[1] - 1
        table = (rows * step + places * run).astype(np.int32)
        table[0, 0] = NOWHERE
        y = np.full((runs[0], y_step), np.nan, np.float32)
        expected = np.zeros_like(y)
        found = x[:, : read[1] * run].reshape(*read, run)[rows, places]
        found[0, 0] = 0
        expected[:, : runs[1] * run] = found.reshape(runs[0], -1)
        slots = [x, y, table, *runs, run, y.strides[0]]
        yield Case(slots, [(y, expected)], 0, f"{runs[0]}x{runs[1]} runs of {run}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows = (
        ("images_take", take, _take_cases), ("rows_take", take_channels, _channel_cases),
        ("rows_take_runs", take_runs, _run_cases),
    )  # fmt: skip
    return [
        Kernel(name, same_for_all(fn), (__name__,), cases, __name__) for name, fn, cases in rows
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
