"""Codes of int8: where a layer's bounds are among them, and the ends of their sums."""

from __future__ import annotations

import math

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.fixed_point import (
    doubling_high,
    quantised_multiplier,
    quantised_multipliers,
    round_away,
)
from headrace.micro.network import Codes, Convolution, Depthwise, Layer, Value

LEAST, MOST = -128, 127


def codes_of(value: Value) -> Codes:
    """How a value is coded.

    Raises:
        UnsupportedError: it is a real number.
    """
    if value.codes is None:
        raise UnsupportedError(
            f"value {value.name}: it is a real number, where layers of int8 codes are asked for"
        )
    return value.codes


def bounds_in_codes(value: Value, bounds: tuple[float, float]) -> tuple[int, int]:
    """The least and the greatest code that a layer with such bounds makes."""
    codes = codes_of(value)

    def code(real: float, end: int) -> int:
        if math.isinf(real):
            return end
        found = codes.zero + round_away(float(np.float32(real) / np.float32(codes.scale)))
        return min(max(found, LEAST), MOST)

    return code(bounds[0], LEAST), code(bounds[1], MOST)


def output_multipliers(layer: Convolution | Depthwise) -> tuple[np.ndarray, np.ndarray]:
    """What takes sums of products to output codes, by channel: multipliers and shifts, int32.

    As TensorFlow Lite Micro does: products of scales in float64, of a fully connected layer with
    one scale for all weights in float32.
    """
    scales = scales_of(layer)
    read, made = codes_of(layer.reads[0]).scale, codes_of(layer.makes).scale
    if len(layer.reads[0].shape) == 1 and (scales == scales[0]).all():
        product = np.float64(np.float32(read) * np.float32(scales[0]))
        one = quantised_multiplier(float(product / np.float64(np.float32(made))))
        return tuple(np.full(len(scales), part, np.int32) for part in one)  # type: ignore[return-value]
    real = np.float64(np.float32(read)) * scales.astype(np.float32).astype(np.float64)
    return quantised_multipliers(real / np.float64(np.float32(made)))


def scales_of(layer: Convolution | Depthwise) -> np.ndarray:
    """Scales of a layer's weights, by channel.

    Raises:
        UnsupportedError: its weights are real numbers.
    """
    if layer.scales is None:
        raise UnsupportedError(
            f"layer {layer.name}: its weights are {layer.weights.dtype}, where int8 is asked for"
        )
    return np.broadcast_to(layer.scales, layer.bias.shape)


def shifted_bias(layer: Convolution | Depthwise, by_channel: np.ndarray) -> np.ndarray:
    """The bias with which products of codes themselves add up to those of numbers, int32.

    Args:
        by_channel: int8 [made, weights].

    Raises:
        UnsupportedError: sums may be too large.
    """
    weights = by_channel.astype(np.int64)
    zero = codes_of(layer.reads[0]).zero
    bias = layer.bias.astype(np.int64) - zero * weights.sum(1)
    multipliers, shifts = (part.astype(np.int64) for part in output_multipliers(layer))
    up, down = shifts.clip(0, 31), np.maximum(-shifts, 0)  # 31 are too many for any sum but 0
    reach = 128 * np.abs(weights).sum(1)
    most, least = (bias + reach) << up, (bias - reach) << up
    # A shift to the right adds half of what it divides by.
    shifted = doubling_high(most, multipliers) + ((1 << down) >> 1)
    if (np.maximum(most, shifted) >= 2**31).any() or (least < -(2**31)).any():
        raise UnsupportedError(
            f"layer {layer.name}: its sums may be from {least.min()} to {most.max()}, more than "
            "32 bits hold; quantise it with other scales, or run it in half precision"
        )
    return np.asarray(bias, np.int32)


def real_multiplier(layer: Layer) -> float:
    """What takes the read codes to the made ones."""
    read, made = codes_of(layer.reads[0]).scale, codes_of(layer.makes).scale
    return float(np.float64(np.float32(read)) / np.float64(np.float32(made)))
