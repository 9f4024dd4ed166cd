"""Sums of two values of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::Add`: both are taken to twice the greater of
their scales, with 20 bits more than codes have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.micro.fixed_point import multiplied, quantised_multiplier
from headrace.micro.int8.codes import bounds_in_codes, codes_of
from headrace.micro.network import Add

MORE_BITS = 20


@dataclass(frozen=True)
class Sum:
    """Multipliers and shifts of both values and of their sum."""

    values: tuple[tuple[int, int], tuple[int, int]]
    total: tuple[int, int]


def sum_of(layer: Add) -> Sum:
    """How a layer adds."""
    first, second = (float(np.float32(codes_of(value).scale)) for value in layer.reads)
    made = float(np.float32(codes_of(layer.makes).scale))
    twice = 2 * max(first, second)
    return Sum(
        (quantised_multiplier(first / twice), quantised_multiplier(second / twice)),
        quantised_multiplier(twice / (2**MORE_BITS * made)),
    )


def scaled(layer: Add, index: int, codes: np.ndarray) -> np.ndarray:
    """One of the values as it is added."""
    wide = codes.astype(np.int64) - codes_of(layer.reads[index]).zero << MORE_BITS
    return multiplied(wide, *sum_of(layer).values[index])


def computed(layer: Add, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    total = scaled(layer, 0, first) + scaled(layer, 1, second)
    codes = multiplied(total, *sum_of(layer).total) + codes_of(layer.makes).zero
    made = np.clip(codes, *bounds_in_codes(layer.makes, layer.bounds))
    return made.astype(np.int8).reshape(layer.makes.shape)
