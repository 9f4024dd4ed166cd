"""Fixed-point arithmetic of 8-bit networks, as TensorFlow Lite's reference kernels have it.

Numbers are arrays of int64 that hold int32. A multiplier is a fraction of 31 bits and a power of
two; products are rounded twice, once where the upper half is taken and once where that is shifted.
Sources: "Quantization and Training of Neural Networks" (Jacob et al., 1712.05877), section 2.2;
gemmlowp's `fixedpoint.h`; TensorFlow Lite's `quantization_util.cc` and `common.h`.
"""

from __future__ import annotations

import math

import numpy as np

ONE = 2**31 - 1  # as a fraction without bits in front of the point
Integers = np.ndarray | int  # int64
_FAR = 2.0**62  # as a factor: no code but 0 stays one


def quantised_multiplier(real: float) -> tuple[int, int]:
    """A factor as (multiplier, shift): multiplier / 2**31 * 2**shift; what is too small is 0,
    and what is far too large 2**62.
    """
    if real == 0:
        return 0, 0
    fraction, shift = math.frexp(min(real, _FAR))
    multiplier = round_away(fraction * 2**31)
    if multiplier == 2**31:
        multiplier, shift = multiplier // 2, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


def quantised_multipliers(real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`quantised_multiplier` of each, as int32."""
    pairs = np.array([quantised_multiplier(float(one)) for one in real], np.int32)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


def round_away(value: float) -> int:
    """The nearest integer; of two the one farther from 0."""
    return math.floor(abs(value) + 0.5) * (1 if value >= 0 else -1)


def in_codes(value: Integers, least: int, most: int) -> np.ndarray:
    """The nearest codes between two, as int8."""
    return np.asarray(np.clip(value, least, most), np.int8)


def doubling_high(a: Integers, b: Integers) -> np.ndarray:
    """The upper half of 2ab, rounded to the nearest; of two the greater one."""
    product = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    return np.asarray(np.minimum((product + 2**30) >> 31, ONE))


def rounding_shift(value: Integers, by: Integers) -> np.ndarray:
    """value / 2**by for by >= 0, rounded to the nearest; of two the one farther from 0."""
    value, by = np.asarray(value, np.int64), np.asarray(by, np.int64)
    half = (np.int64(1) << by) >> 1
    return np.asarray((value + half - ((value < 0) & (by > 0))) >> by)


def multiplied(value: Integers, multiplier: Integers, shift: Integers) -> np.ndarray:
    """value * multiplier / 2**31 * 2**shift; what is too large is the nearest number there is."""
    shift = np.asarray(shift, np.int64)
    up = _saturating_shift(value, shift.clip(0, 31))
    return rounding_shift(doubling_high(up, multiplier), np.maximum(-shift, 0))


def _saturating_shift(value: Integers, by: Integers) -> np.ndarray:
    """value * 2**by, or the nearest number that there is."""
    return np.asarray(np.clip(np.asarray(value, np.int64) << by, -(2**31), ONE))


def _exp_of_quarter(a: Integers) -> np.ndarray:
    """exp(a) of -1/4 <= a < 0, fractions: a Taylor series around -1/8."""
    x = a + 2**28
    square = doubling_high(x, x)
    cube, fourth = doubling_high(square, x), doubling_high(square, square)
    third = doubling_high(rounding_shift(fourth, 2) + cube, 715827883)
    at_eighth = 1895147668
    return np.asarray(at_eighth + doubling_high(at_eighth, x + rounding_shift(third + square, 1)))


# exp(-2**(i - 2)) as fractions.
_POWERS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)


def exp_of_negatives(a: Integers, integer_bits: int) -> np.ndarray:
    """exp(a) as a fraction, of a <= 0 with up to 5 bits in front of the point."""
    a = np.asarray(a, np.int64)
    point = 31 - integer_bits
    quarter = 1 << (point - 2)
    rest = (a & (quarter - 1)) - quarter
    result = _exp_of_quarter(_saturating_shift(rest, integer_bits))
    left = rest - a
    for i, power in enumerate(_POWERS):
        if integer_bits > i - 2:
            there = (left & (1 << (point + i - 2))) != 0
            result = np.where(there, doubling_high(result, power), result)
    return np.where(a == 0, ONE, result)


def _inverse(a: Integers) -> np.ndarray:
    """2 / (1 + a) of a fraction a, with 2 bits in front of the point: Newton-Raphson."""
    half = (np.asarray(a, np.int64) + ONE + 1) // 2
    x = 1515870810 + doubling_high(half, -1010580540)
    for _ in range(3):
        rest = 2**29 - doubling_high(half, x)
        x = x + _saturating_shift(doubling_high(x, rest), 2)
    return x


def one_over_one_plus(a: Integers) -> np.ndarray:
    """1 / (1 + a) as a fraction, of a fraction a."""
    return _saturating_shift(_inverse(a), 1)


def logistic(a: Integers, integer_bits: int) -> np.ndarray:
    """1 / (1 + exp(-a)) as a fraction."""
    a = np.asarray(a, np.int64)
    positive = one_over_one_plus(exp_of_negatives(-np.abs(a), integer_bits))
    return np.where(a == 0, 2**30, np.where(a > 0, positive, ONE - positive))


def tanh(a: Integers, integer_bits: int) -> np.ndarray:
    """tanh(a) as a fraction."""
    a = np.asarray(a, np.int64)
    powers = exp_of_negatives(-np.abs(a), integer_bits + 1)
    size = _saturating_shift(_inverse(powers) - 2**29, 2)
    return np.where(a == 0, 0, np.where(a < 0, -size, size))


def reciprocal(value: Integers, integer_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """1 / value of positive values: a fraction, and the power of two that it is to be divided by.

    Args:
        integer_bits: in front of the point of `value`.
    """
    value = np.asarray(value, np.int64)
    headroom = 32 - np.ceil(np.log2(value + 1)).astype(np.int64)
    return one_over_one_plus((value << headroom) - 2**31), integer_bits - headroom
