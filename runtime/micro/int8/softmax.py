"""Softmax of int8 codes.

Source: TensorFlow Lite's `reference_ops::Softmax` of fixed-point numbers, whose codes have a scale
of 1/256; for others one more product takes the reciprocal of the sum to theirs.
"""

from __future__ import annotations

import math

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.fixed_point import (
    doubling_high,
    exp_of_negatives,
    in_codes,
    multiplied,
    quantised_multiplier,
    reciprocal,
    rounding_shift,
)
from headrace.micro.int8.codes import LEAST, MOST, codes_of
from headrace.micro.kernels import softmax_i8
from headrace.micro.kernels.softmax_i8 import SUM_BITS
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Softmax
from headrace.targets.target import Target

DIFFERENCE_BITS = 5  # in front of the point of what exp is taken of
_MOST_UP = 20  # so that shifts are to the right


def exps(layer: Softmax) -> np.ndarray:
    """exp(-i * scale) of differences i of codes, 0..255: int32 fractions; far ones are 0."""
    scale = float(np.float32(codes_of(layer.reads[0]).scale))
    real = min(layer.beta * scale * 2 ** (31 - DIFFERENCE_BITS), 2.0**31 - 1)
    multiplier, shift = quantised_multiplier(real)
    radius = (2**DIFFERENCE_BITS - 1) * 2.0 ** (31 - DIFFERENCE_BITS - shift)
    differences = np.arange(256)
    near = differences <= math.floor(radius)
    powers = multiplied(np.where(near, -differences, 0), multiplier, shift)
    return np.where(near, exp_of_negatives(powers, DIFFERENCE_BITS), 0).astype(np.int32)


def _output(layer: Softmax) -> tuple[int, int]:
    """Multiplier and shift from 1/256 to the scale that is made; a multiplier of 0: it is that.

    Raises:
        UnsupportedError: the scale is too small.
    """
    ratio = 1 / (256 * float(np.float32(codes_of(layer.makes).scale)))
    if abs(ratio - 1) < 1e-3:
        return 0, 0
    multiplier, up = quantised_multiplier(ratio)
    if up > _MOST_UP:
        raise UnsupportedError(
            f"layer {layer.name}: softmax makes codes of scale {1 / 256 / ratio:g}, which is far "
            "less than 1/256"
        )
    return multiplier, up


def computed(layer: Softmax, target: Target, codes: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    pixels = codes.reshape(-1, layer.reads[0].image[2]).astype(np.int64)
    each = exps(layer).astype(np.int64)[pixels.max(1, keepdims=True) - pixels]
    sums = rounding_shift(each, SUM_BITS).sum(1, keepdims=True)
    scale, bits = reciprocal(sums, SUM_BITS)
    multiplier, up = _output(layer)
    if multiplier:
        scale = doubling_high(scale, multiplier)
    shifts = np.minimum(bits + 31 - 8 - up, 62)
    found = rounding_shift(doubling_high(scale, each), shifts) + codes_of(layer.makes).zero
    return in_codes(found, LEAST, MOST).reshape(layer.makes.shape)


def lowered(layer: Softmax, target: Target) -> Lowered:
    """Calls of kernels."""
    read, made, name = layer.reads[0], layer.makes, f"{layer.name}/exps"
    rows, columns, channels = read.image
    ends = (*_output(layer), codes_of(made).zero)
    slots = (At(read.name), At(name), At(made.name), rows * columns, channels, *ends)
    return Lowered((Step(softmax_i8.NAME, slots),), {name: exps(layer)}, 0, (read.name,))
