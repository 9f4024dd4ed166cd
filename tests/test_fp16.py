"""Short floats in numpy, against exact fractions and against numpy's own."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.targets.fp16 import BFLOAT16, HALF, SINGLE, Arithmetic, FloatFormat

FORMATS = {one.name: one for one in (HALF, BFLOAT16, SINGLE)}
NEAREST = Arithmetic(HALF)


def rounded(x: Fraction, of: FloatFormat, rounding: str) -> float:
    """A number of a format, by the definition."""
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = math.floor(math.log2(size))
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    step = Fraction(2) ** (max(exponent, of.least) - of.precision + 1)
    whole = {
        "nearest": round, "zero": math.trunc, "up": math.ceil, "down": math.floor
    }[rounding](x / step)  # fmt: skip
    found = whole * step
    if abs(found) <= Fraction(of.largest):
        return float(found)
    inwards = {"zero": True, "up": x < 0, "down": x > 0}.get(rounding, False)
    return math.copysign(of.largest if inwards else math.inf, x)


def halves() -> st.SearchStrategy[float]:
    """Finite ones."""
    bits = st.integers(0, 0xFFFF).filter(lambda n: n & 0x7C00 != 0x7C00)
    return bits.map(lambda n: float(np.array(n, np.uint16).view(np.float16)))


def of_format(fmt: FloatFormat) -> st.SearchStrategy[float]:
    mantissa = st.integers(-(2**fmt.precision) + 1, 2**fmt.precision - 1)
    exponent = st.integers(fmt.least - fmt.precision + 1, fmt.most - fmt.precision + 1)
    return st.builds(math.ldexp, mantissa, exponent)


@pytest.mark.parametrize("rounding", ["nearest", "zero", "up", "down"])
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_results_are_the_exact_ones_rounded_once(name: str, rounding: Any, data: Any) -> None:
    fmt = FORMATS[name]
    a, b, c = (data.draw(of_format(fmt)) for _ in range(3))
    of = Arithmetic(fmt, rounding)
    x, y, z = Fraction(a), Fraction(b), Fraction(c)
    assert of.add(a, b) == rounded(x + y, fmt, rounding)
    assert of.subtract(a, b) == rounded(x - y, fmt, rounding)
    assert of.multiply(a, b) == rounded(x * y, fmt, rounding)
    assert of.fma(a, b, c) == rounded(x * y + z, fmt, rounding)


def test_all_halves_are_kept() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    found = NEAREST.stored(NEAREST.round(NEAREST.operand(every)))
    numbers = ~np.isnan(every)
    assert (found.view(np.uint16)[numbers] == every.view(np.uint16)[numbers]).all()
    assert np.isnan(found[~numbers]).all()


@np.errstate(all="ignore")
def test_as_numpy_computes() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 1 << 16, (2, 100_000)).astype(np.uint16).view(np.float16)
    for found, expected in (
        (NEAREST.add(a, b), a + b),
        (NEAREST.subtract(a, b), a - b),
        (NEAREST.multiply(a, b), a * b),
    ):
        same = NEAREST.stored(found).view(np.uint16) == expected.view(np.uint16)
        assert (same | np.isnan(expected)).all()
        assert (np.isnan(found) == np.isnan(expected)).all()
    wide = rng.standard_normal(100_000) * np.exp2(rng.integers(-140, 126, 100_000))
    assert (Arithmetic(SINGLE).round(wide) == wide.astype(np.float32).astype(float)).all()
    short = wide.astype(np.float32)  # from float64 the library rounds twice
    assert (Arithmetic(BFLOAT16).round(short) == short.astype(ml_dtypes.bfloat16)).all()


def test_a_fused_sum_is_not_two_roundings() -> None:
    """1 + 2^-10 squared is 1 + 2^-9 + 2^-20, whose end a product of halves loses."""
    a, c = 1 + 2.0**-10, -(1 + 2.0**-9)
    assert NEAREST.fma(a, a, c) == 2.0**-20
    assert NEAREST.add(NEAREST.multiply(a, a), c) == 0


def test_sums_that_float64_does_not_hold() -> None:
    """A tiny product decides to which side a tie falls."""
    one, tie = 2048.0, 1.0  # 2049 is in the middle of two halves
    tiny = 2.0**-24
    assert NEAREST.add(one, tie) == 2048
    assert NEAREST.fma(tiny, tiny, 2048.0) == 2048
    assert Arithmetic(HALF, "up").fma(tiny, tiny, 2048.0) == 2050
    assert Arithmetic(HALF, "down").fma(-tiny, tiny, 2048.0) == 2047


def test_subnormal_numbers_vanish_where_a_chip_flushes() -> None:
    flushes = Arithmetic(SINGLE, flush=True)
    small = 2.0**-126
    assert flushes.multiply(small, 0.5) == 0
    assert math.copysign(1, float(flushes.multiply(-small, 0.5))) == -1
    assert flushes.add(small / 2, small) == small  # the operand counts as 0
    assert Arithmetic(SINGLE).add(small / 2, small) == 1.5 * small


def test_stochastic_rounding_is_right_on_average() -> None:
    of = Arithmetic(HALF, "stochastic", random=np.random.default_rng(1))
    x = np.full(40_000, 1 + 0.3 * 2.0**-10)
    found = of.round(x)
    assert set(found) == {1, 1 + 2.0**-10}
    assert abs((found - 1).mean() * 2**10 - 0.3) < 5 * (0.21 / len(x)) ** 0.5
    assert (of.round(-x) <= -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "odd"}, "rounding is one of"),
        ({"rounding": "stochastic"}, "needs a generator"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arithmetic(HALF, **options)


@given(st.lists(halves(), min_size=6, max_size=6))
@settings(max_examples=100, deadline=None)
def test_matmul_adds_in_the_order_of_k(values: list[float]) -> None:
    a, b = np.array(values[:3])[None], np.array(values[3:])[:, None]
    with np.errstate(all="ignore"):
        total = NEAREST.operand(0.0)
        for k in range(3):
            total = NEAREST.fma(a[0, k], b[k, 0], total)
        found = NEAREST.matmul(a, b)[0, 0]
    assert found == total or (np.isnan(found) and np.isnan(total))
