"""Sums of two values of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::Add`: both are taken to twice the greater of
their scales, with 20 bits more than codes have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.fixed_point import in_codes, multiplied, quantised_multiplier
from headrace.micro.int8.codes import bounds_in_codes, codes_of
from headrace.micro.kernels import add_i8
from headrace.micro.kernels.add_i8 import EXACT, MORE_BITS
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import Add
from headrace.targets.target import Target


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


def computed(layer: Add, target: Target, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    total = scaled(layer, 0, first) + scaled(layer, 1, second)
    codes = multiplied(total, *sum_of(layer).total) + codes_of(layer.makes).zero
    made = in_codes(codes, *bounds_in_codes(layer.makes, layer.bounds))
    return made.reshape(layer.makes.shape)


def lowered(layer: Add, target: Target) -> Lowered:
    """Calls of kernels."""
    of, made = sum_of(layer), layer.makes
    # The one with the greater scale goes first: it is not rounded.
    order = sorted(range(2), key=lambda index: of.values[index] != EXACT)
    first, second = (layer.reads[index] for index in order)
    slots: list[int | At] = [At(first.name), At(second.name), At(made.name), At(SCRATCH)]
    slots += [made.elements, -codes_of(first).zero, -codes_of(second).zero]
    multiplier, shift = of.values[order[1]]
    # What is too small has the multiplier 0, whose shift is none.
    slots += (multiplier, shift) if (multiplier, shift) == EXACT else (multiplier, min(shift, -1))
    multiplier, shift = of.total
    if shift > 0:
        raise UnsupportedError(
            f"layer {layer.name}: it adds codes of scales whose sum does not fit in those that it "
            f"makes, of {codes_of(made).scale:g}; quantise it with a larger scale"
        )
    slots += [multiplier, shift, codes_of(made).zero, *bounds_in_codes(made, layer.bounds)]
    over = tuple(value.name for value in layer.reads)
    return Lowered((Step(add_i8.NAME, tuple(slots)),), {}, add_i8.SCRATCH_BYTES, over)
