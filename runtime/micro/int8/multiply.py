"""Products of two values of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::Mul`.
"""

from __future__ import annotations

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.fixed_point import in_codes, multiplied, quantised_multiplier
from headrace.micro.int8.codes import bounds_in_codes, codes_of
from headrace.micro.kernels import multiply_i8
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import Multiply
from headrace.targets.target import Target


def factor_of(layer: Multiply) -> tuple[int, int]:
    """Multiplier and shift of products of codes.

    Raises:
        UnsupportedError: the scale of what is made is far less than the product of the others.
    """
    first, second = (np.float32(codes_of(value).scale) for value in layer.reads)
    made = np.float32(codes_of(layer.makes).scale)
    found = quantised_multiplier(float(first * second / made))
    if found[1] > multiply_i8.MOST_UP:
        raise UnsupportedError(
            f"layer {layer.name}: it makes codes of scale {made:g} of such of {first:g} and "
            f"{second:g}; quantise it with a larger one"
        )
    return found


def computed(layer: Multiply, target: Target, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    a, b = (
        codes.astype(np.int64) - codes_of(value).zero
        for codes, value in zip((first, second), layer.reads, strict=True)
    )
    channels = layer.reads[1].elements
    product = a.reshape(-1, channels) * b.reshape(1, channels)
    codes = multiplied(product, *factor_of(layer)) + codes_of(layer.makes).zero
    made = in_codes(codes, *bounds_in_codes(layer.makes, layer.bounds))
    return made.reshape(layer.makes.shape)


def lowered(layer: Multiply, target: Target) -> Lowered:
    """Calls of kernels."""
    made, channels = layer.makes, layer.reads[1].elements
    multiplier, shift = factor_of(layer)
    slots: tuple[int | At, ...] = (
        *(At(value.name) for value in layer.reads), At(made.name), At(SCRATCH),
        made.elements // channels, channels, *(-codes_of(value).zero for value in layer.reads),
        1 << max(shift, 0), multiplier, min(shift, 0), codes_of(made).zero,
        *bounds_in_codes(made, layer.bounds),
    )  # fmt: skip
    over = tuple(value.name for value in layer.reads if value.elements == made.elements)
    return Lowered((Step(multiply_i8.NAME, slots),), {}, multiply_i8.SCRATCH_BYTES, over)
