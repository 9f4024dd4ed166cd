"""Softmax of each pixel's channels, in float32 on all chips.

exp(x) of x <= 0 is 2^k times a polynomial of the rest, of degree 6 (Cody and Waite, 1980): within
2 units of float32's last place; what is below exp(-80) counts as that, so that no number is
subnormal. Lanes take every fourth channel's exponentials in order, and are added up in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.numbers import KINDS, WIDE_LANES, Kind, Numbers, dtype_of, numbers_of
from headrace.targets.fp16 import SINGLE, Arithmetic, Values
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bits_f32,
    f32,
    fma,
    iota_i32,
    max_f32,
    maximum,
    round_i32,
    select_lt,
    shl,
    smaller,
    splat_f32,
    splat_i32,
    stack_bytes,
    sum_f32,
    to_f32,
    with_lanes,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

NAMES: dict[Kind, str] = {kind: f"softmax_{kind}" for kind in KINDS}
LEAST = -80.0
_LOG2E = float(np.float32(math.log2(math.e)))
# ln 2 in two parts: the first has few bits, so that its products are exact.
_LN2, _LN2_REST = 0.693359375, float(np.float32(math.log(2) - 0.693359375))
_C6, _C5, _C4, _C3 = (float(np.float32(1 / math.factorial(i))) for i in (6, 5, 4, 3))


def exponential(x: Any) -> Any:
    """exp(x) of vectors of float32 up to 0."""
    x = maximum(x, splat_f32(LEAST))
    k = round_i32(x * splat_f32(_LOG2E))
    whole = to_f32(k)
    rest = fma(whole, splat_f32(-_LN2_REST), fma(whole, splat_f32(-_LN2), x))
    y = fma(splat_f32(_C6), rest, splat_f32(_C5))
    y = fma(fma(fma(y, rest, splat_f32(_C4)), rest, splat_f32(_C3)), rest, splat_f32(0.5))
    y = fma(fma(y, rest, splat_f32(1.0)), rest, splat_f32(1.0))
    return y * bits_f32(shl(k + splat_i32(127), 23))


def exponential_reference(x: Values) -> Values:
    """The same in numpy."""
    of = Arithmetic(SINGLE)
    x = np.where(x < LEAST, LEAST, x)
    k = np.rint(of.multiply(x, _LOG2E))
    rest = of.fma(k, -_LN2_REST, of.fma(k, -_LN2, x))
    y = of.fma(_C6, rest, _C5)
    for term in (_C4, _C3, 0.5, 1.0, 1.0):
        y = of.fma(y, rest, term)
    return of.multiply(y, np.ldexp(1.0, np.nan_to_num(k).astype(int)))


def _softmax(numbers: Numbers) -> KernelFunction:
    load, store, get, put = numbers.load, numbers.store, numbers.get, numbers.put
    size, lanes = numbers.bytes, numbers.lanes

    def within(n: Any, at: Any, yes: Any, no: Any) -> Any:
        return select_lt(iota_i32() + splat_i32(at), splat_i32(n), yes, no)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        x, c = arg_ptr(args, 0), arg_ptr(args, 1)
        n, beta = arg_int(args, 3), splat_f32(arg_float(args, 4))
        for _pixel in range(arg_int(args, 2)):
            most = splat_f32(get(x))
            for i in range(0, n, lanes):
                most = maximum(most, within(n, i, load(x + i * size, 1, 0), most))
            greatest = splat_f32(max_f32(most))
            sums = zeros_f32(1)
            for i in range(0, n, lanes):
                e = exponential((load(x + i * size, 1, 0) - greatest) * beta)
                sums = sums + within(n, i, e, zeros_f32(1))
            scale = splat_f32(f32(1.0) / sum_f32(sums))
            place = stack_bytes(64)
            for i in range(0, n, lanes):
                store(place, exponential((load(x + i * size, 1, 0) - greatest) * beta) * scale, 0)
                for j in range(smaller(lanes, n - i)):
                    put(c + (i + j) * size, get(place + j * size))
            x, c = x + n * size, c + n * size

    return with_lanes(kernel, lanes)


def reference(numbers: Numbers, x: np.ndarray, beta: float) -> np.ndarray:
    """What a chip makes of [pixels, channels]."""
    of = Arithmetic(SINGLE)
    x, n = x.astype(np.float64), x.shape[1]
    e = exponential_reference(
        of.multiply(of.subtract(x, x.max(1, keepdims=True)), np.float32(beta))
    )
    sums = np.zeros((len(x), WIDE_LANES))
    for i in range(n):
        sums[:, i % WIDE_LANES] = of.add(sums[:, i % WIDE_LANES], e[:, i])
    total = of.add(of.add(sums[:, 0], sums[:, 2]), of.add(sums[:, 1], sums[:, 3]))
    return numbers.stored(of.multiply(e, of.round(1 / total)[:, None]))


def _cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    numbers = numbers_of(target, kind, wide=True)
    for pixels, n, spread in ((1, 10, 3.0), (3, 5, 60.0), (1, 2, 1.0), (2, 16, 0.1)):
        x = (spread * rng.standard_normal((pixels, n))).astype(dtype_of(kind))
        if pixels > 1:
            x[0, n // 2] = np.nan if n < 16 else -np.inf
            x[1, 1] = np.inf
        for beta in (1.0, 0.3):
            c = np.zeros_like(x)
            expected = reference(numbers, x, beta)
            yield Case([x, c, pixels, n, beta], [(c, expected)], 0, f"{pixels}x{n} {beta}")


def _build(kind: Kind, target: Target) -> KernelFunction:
    return _softmax(numbers_of(target, kind, wide=True))


def all_kernels() -> list[Kernel]:
    """One for each kind of number."""
    return [
        Kernel(
            name,
            partial(_build, kind),
            (__name__, numbers_of.__module__),
            partial(_cases, kind),
        )
        for kind, name in NAMES.items()
    ]
