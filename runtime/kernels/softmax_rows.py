"""Softmax of rows, or across them: in three passes, or in two where a row is larger than the cache.

Three passes: the largest value; exponentials of the differences to it, and their sum; shares of it.
Two passes (Dukhan and Ablavatski 2020, arXiv:2001.04438) keep e**x as p * 2**n with a float n, for
which no x is too large: a sum of such pairs needs no largest value, so x is read twice and y is
only written.

Sums are sums of parts: in one long sum of equal values each rounding errs to the same side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp, exp_parts
from headrace.targets.simd import (
    absolute,
    arg_int,
    arg_ptr,
    bits_f32,
    fma,
    iota_i32,
    load_f32,
    max_f32,
    maximum,
    round_i32,
    select_lt,
    shl,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    sum_f32,
    to_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

CACHE = 1 << 18  # values: rows that are longer come from memory in each pass
PART = 4096  # values of a row that are summed by themselves
WIDE = 1e5  # rows with larger values take three passes: see `exp_parts`
INFINITE = float("inf")
NONE = float("nan")


def _two_to(n: Any) -> Any:
    """2**n of float32 lanes of whole numbers up to 0; 0 below -126."""
    return bits_f32(shl(round_i32(maximum(n, splat_f32(-127.0))) + splat_i32(127), 23))


def _value(p: Any, i: Any, n: Any, other: Any) -> Any:
    """16 values of a row, and `other` behind its end."""
    there = iota_i32() + splat_i32(i)
    return select_lt(there, splat_i32(n), load_f32(p + i * 4, 1, 0), splat_f32(other))


def _three_passes(x: Any, y: Any, n: Any) -> None:
    top = splat_f32(-INFINITE)
    total = zeros_f32(1)
    for i in range(0, n, 16):
        v = _value(x, i, n, -INFINITE)
        top = maximum(top, v)
        # An infinite value, or one that is none, makes no numbers of the row.
        total = total + select_lt(v, splat_f32(INFINITE), splat_f32(0.0), splat_f32(NONE))
    highest = max_f32(top)
    if highest < -3.4028235e38:
        total = splat_f32(NONE)
    for begin in range(0, n, PART):
        part = zeros_f32(1)
        for i in range(begin, smaller(begin + PART, n), 16):
            e = exp(_value(x, i, n, -INFINITE) - splat_f32(highest))
            store_f32(y + i * 4, e, 0)
            part = part + e
        total = total + part
    scale = splat_f32(1.0 / sum_f32(total))
    for i in range(0, n, 16):
        store_f32(y + i * 4, load_f32(y + i * 4, 1, 0) * scale, 0)
    store_f32(y + (n - 1) // 16 * 64, _value(y, (n - 1) // 16 * 16, n, 0.0), 0)  # pads


def softmax(args: Any, thread: Any, n_threads: Any) -> None:
    """y = e**x / sum of e**x, row by row; pads of y are zero. Threads share the rows.

    Slots: 0 x [rows][padded to 16], 1 y, 2 rows, 3 values of a row, 4 the most of them that take
    three passes. A row with an infinite value, one that is no number, or with nothing but -inf
    gives no numbers.
    """
    rows = arg_int(args, 2)
    n = arg_int(args, 3)
    row = (n + 15) // 16 * 64
    for r in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        x = arg_ptr(args, 0) + r * row
        y = arg_ptr(args, 1) + r * row
        sums = zeros_f32(1)
        powers = splat_f32(-4.0 * WIDE)
        beyond = zeros_f32(1)  # values that pairs are not for
        if n > arg_int(args, 4):
            for begin in range(0, n, PART):
                part = zeros_f32(1)
                highest = splat_f32(-4.0 * WIDE)
                for i in range(begin, smaller(begin + PART, n), 16):
                    v = _value(x, i, n, -WIDE)
                    beyond = beyond + select_lt(
                        splat_f32(WIDE * 1.01) - absolute(v), zeros_f32(1), splat_f32(1.0), v - v
                    )
                    p, k = exp_parts(_value(x, i, n, -2.0 * WIDE))
                    power = to_f32(k)
                    both = maximum(highest, power)
                    part = fma(part, _two_to(highest - both), p * _two_to(power - both))
                    highest = both
                both = maximum(powers, highest)
                sums = fma(sums, _two_to(powers - both), part * _two_to(highest - both))
                powers = both
        if n > arg_int(args, 4) and sum_f32(beyond) == 0.0:
            most = splat_f32(max_f32(powers))
            scale = splat_f32(1.0 / sum_f32(sums * _two_to(powers - most)))
            for i in range(0, n, 16):
                p, k = exp_parts(_value(x, i, n, -2.0 * WIDE))
                store_f32(y + i * 4, p * scale * _two_to(to_f32(k) - most), 0)
            store_f32(y + (n - 1) // 16 * 64, _value(y, (n - 1) // 16 * 16, n, 0.0), 0)
        else:
            _three_passes(x, y, n)


def softmax_across(args: Any, thread: Any, n_threads: Any) -> None:
    """y = e**x / sum of e**x over all i of [outer][i][vectors][16]; what becomes NaN as of rows.

    Slots: 0 x, 1 y, 2 outer ones, 3 values that are one together, 4 vectors that lie side by side.
    Threads share outer ones and vectors.
    """
    n = arg_int(args, 3)
    vectors = arg_int(args, 4)
    step = vectors * 64
    units = arg_int(args, 2) * vectors
    for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
        outer = u // vectors
        at = outer * n * step + (u - outer * vectors) * 64
        x = arg_ptr(args, 0) + at
        y = arg_ptr(args, 1) + at
        top = splat_f32(-INFINITE)
        total = zeros_f32(1)
        for i in range(n):
            v = load_f32(x + i * step, 1, 0)
            top = maximum(top, v)
            total = total + select_lt(v, splat_f32(INFINITE), splat_f32(0.0), splat_f32(NONE))
        least = splat_f32(-3.4028235e38)
        total = total + select_lt(top, least, splat_f32(NONE), splat_f32(0.0))
        top = maximum(top, least)
        for begin in range(0, n, PART):
            part = zeros_f32(1)
            for i in range(begin, smaller(begin + PART, n)):
                e = exp(load_f32(x + i * step, 1, 0) - top)
                store_f32(y + i * step, e, 0)
                part = part + e
            total = total + part
        scale = splat_f32(1.0) / total
        for i in range(n):
            store_f32(y + i * step, load_f32(y + i * step, 1, 0) * scale, 0)


# Rows, values, spread, and the most values that take three passes.
_SHAPES = ((3, 37, 1.0, 99), (5, 16, 300.0, 99), (2, 37, 1.0, 1), (3, 4096, 1.0, 1),
           (2, 50, 300.0, 1), (1, 1, 1.0, 1), (2, 33, 1e6, 1), (1, 300_001, 0.0, 1),
           (1, 300_001, 0.0, 1 << 20))  # fmt: skip


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for rows, n, spread, most in _SHAPES:
        padded = -(-n // 16) * 16
        x = np.full((rows, padded), np.nan, np.float32)
        x[:, :n] = rng.standard_normal((rows, n)) * spread
        if spread == 0.0:  # equal values, whose exponentials are no whole numbers
            x[:, :n] = 0.3
            x[:, 0] = 1.0
        if n > 1 and rows > 2:
            x[0, 0] = x[1, : n - 1] = -INFINITE
        yield _case(x, n, most, f"{rows}x{n}, spread {spread:g}")


def _cases_across(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for outer, n, vectors, spread in ((2, 5, 3, 1.0), (1, 40, 1, 300.0), (3, 1, 2, 1.0)):
        x = (rng.standard_normal((outer, n, vectors * 16)) * spread).astype(np.float32)
        if n > 1:
            x[0, 0] = x[-1, 2:, 3] = -INFINITE
        expected, bound = _expected(x, 1, n)
        y = np.full(x.shape, np.nan, np.float32)
        label = f"{outer}x{n}x{vectors}, spread {spread:g}"
        yield Case([x, y, outer, n, vectors], [(y, expected)], bound, label)


def _expected(x: np.ndarray, axis: int, terms: float) -> tuple[np.ndarray, np.ndarray]:
    """Of real values, and how far off that may be in sums of so many terms."""
    import numpy as np

    real = x.astype(np.float64)
    largest = real.max(axis, keepdims=True)
    e = np.exp(real - largest)
    expected = e / e.sum(axis, keepdims=True)
    # Differences are rounded once, exponentials are off by 3e-7, sums by a unit for each term.
    apart = np.minimum(np.abs(real - largest), 90)
    bound = 1e-37 + expected * (apart * 2 + terms + 24) * 2.0**-23
    return expected.astype(np.float32), bound


def _case(x: np.ndarray, n: int, most: int, label: str) -> Case:
    import numpy as np

    expected, bound = np.zeros(x.shape, np.float32), np.full(x.shape, 1e-37)
    terms = min(n / 16, PART / 16 + n / PART)
    expected[:, :n], bound[:, :n] = _expected(x[:, :n], 1, terms)
    y = np.full(x.shape, np.nan, np.float32)
    return Case([x, y, len(x), n, most], [(y, expected)], bound, label)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.math")
    across = same_for_all(softmax_across)
    return [
        Kernel("softmax_rows_f32", same_for_all(softmax), sources, _cases, __name__),
        Kernel("softmax_across_f32", across, sources, _cases_across, __name__),
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
