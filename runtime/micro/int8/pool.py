"""The mean and the most of windows of int8 codes.

A mean of codes that stay the same is rounded as a code: TensorFlow Lite's `AveragePool`. One of
other codes, and what a file calls MEAN, is its `QuantizedMeanOrSum`, of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.fixed_point import (
    ONE,
    doubling_high,
    in_codes,
    quantised_multiplier,
    rounding_shift,
)
from headrace.micro.int8.codes import bounds_in_codes, codes_of, real_multiplier
from headrace.micro.kernels import pool_i8
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import Pool
from headrace.micro.windows import windows_of
from headrace.targets.target import Target

# Of a window. A multiplier is too large by up to 2**-31, so a mean by up to 128 * count * 2**-31,
# which is to be less than what is between it and the next tie, 1 / (2 * count).
MOST_PIXELS = 2048
OUTSIDE = -128  # is no more than any code


@dataclass(frozen=True)
class Mean:
    """How sums become means: (doubling_high(sum + start << up, multiplier) >> down) + zero.

    Attributes:
        multipliers: by the number of pixels, from 0 on; int32.
    """

    multipliers: np.ndarray
    start: int = 0
    up: int = 0
    down: int = 0
    zero: int = 0


def changes_codes_of_windows(layer: Pool) -> bool:
    """Whether it has no arithmetic of codes: its windows are parts of an image, and codes change.

    The most of codes is one of them.
    """
    same = layer.reads[0].codes == layer.makes.codes
    return not same and (layer.kind == "most" or layer.windows.taps != layer.reads[0].image[:2])


def mean_of(layer: Pool) -> Mean:
    """How a layer's sums become means.

    Raises:
        UnsupportedError: windows are too large.
    """
    read, made = layer.reads[0], layer.makes
    pixels = layer.windows.taps[0] * layer.windows.taps[1]
    if pixels > MOST_PIXELS:
        raise UnsupportedError(
            f"layer {layer.name}: the mean of {pixels} pixels, where up to {MOST_PIXELS} are done"
        )
    if codes_of(read) == codes_of(made) and not layer.of_numbers:
        # The next number after 1 / n: what lies between two codes is rounded away from 0.
        exact = [min(2**31 // n + 1, ONE) for n in range(1, pixels + 1)]
        return Mean(np.array([0, *exact], np.int32))
    rows, columns, _ = read.image
    if layer.windows.taps != (rows, columns):
        raise UnsupportedError(
            f"layer {layer.name}: means of windows whose codes change from {read.codes} to "
            f"{made.codes} are done of whole images only"
        )
    multiplier, shift = quantised_multiplier(real_multiplier(layer))
    fold = min(pixels.bit_length() - 1, 31 + shift)
    multipliers = np.zeros(pixels + 1, np.int32)
    multipliers[pixels] = (multiplier << fold) // pixels
    shift -= fold
    start = -codes_of(read).zero * pixels
    if (255 * pixels) << max(shift, 0) >= 2**31:
        raise UnsupportedError(
            f"layer {layer.name}: it makes codes of scale {codes_of(made).scale:g} of such of "
            f"{codes_of(read).scale:g}; quantise it with a larger one"
        )
    return Mean(multipliers, start, max(shift, 0), max(-shift, 0), codes_of(made).zero)


def computed(layer: Pool, target: Target, codes: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    image = codes.reshape(layer.reads[0].image)
    made = layer.makes.image
    if layer.kind == "most":
        found = windows_of(image, layer.windows, made[:2], OUTSIDE).max((2, 3))
    else:
        of = mean_of(layer)
        sums = windows_of(image, layer.windows, made[:2], 0).sum((2, 3))
        there = windows_of(np.ones_like(image), layer.windows, made[:2], 0).sum((2, 3))
        means = doubling_high(sums + of.start << of.up, of.multipliers[there])
        found = rounding_shift(means, of.down) + of.zero
    bounds = bounds_in_codes(layer.makes, layer.bounds)
    return in_codes(found, *bounds).reshape(layer.makes.shape)


def lowered(layer: Pool, target: Target) -> Lowered:
    """Calls of kernels."""
    read, made = layer.reads[0], layer.makes
    slots: tuple[int | At, ...] = (
        At(read.name), At(made.name), At(SCRATCH),
        *pool_i8.geometry(read.image, made.image, layer.windows),
        *bounds_in_codes(made, layer.bounds),
    )  # fmt: skip
    # A single pixel's channels are written when nobody needs what they cover.
    over = (read.name,) if made.image[:2] == (1, 1) else ()
    if layer.kind == "most":
        return Lowered((Step(pool_i8.MOST, slots),), {}, pool_i8.SCRATCH_BYTES, over)
    of, name = mean_of(layer), f"{layer.name}/multipliers"
    slots = (*slots, At(name), of.start, of.up, -of.down, of.zero)
    constants = {name: of.multipliers}
    return Lowered((Step(pool_i8.MEAN, slots),), constants, pool_i8.SCRATCH_BYTES, over)
