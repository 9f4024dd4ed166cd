"""Functions of single int8 codes: a table of 256, which a file is made into once.

Sources: TensorFlow Lite's kernels of `Logistic`, `Tanh`, `HardSwish`, `QuantizeLeakyRelu` and
`Requantize`, whose fixed-point arithmetic decides the last bit. What it has no kernel for is
rounded from the real number: hard sigmoids, codes of scales that its kernels do not make, float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from headrace.micro.fixed_point import (
    in_codes,
    logistic,
    multiplied,
    quantised_multiplier,
    round_away,
    rounding_shift,
    tanh,
)
from headrace.micro.int8.codes import LEAST, MOST, bounds_in_codes, codes_of, real_multiplier
from headrace.micro.kernels import lookup_i8, lookup_single
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import UNBOUNDED, Activation
from headrace.targets.target import Target

INPUT_BITS = 4  # in front of the point of what sigmoid and tanh are taken of


def _single(value: float) -> np.float32:
    return np.float32(value)


def _rescaled(layer: Activation, x: np.ndarray) -> np.ndarray:
    """Other codes. A bounded one is an operator RELU, which divides in float32."""
    real = real_multiplier(layer)
    if layer.bounds != UNBOUNDED:
        read, made = codes_of(layer.reads[0]).scale, codes_of(layer.makes).scale
        real = float(_single(read) / _single(made))
    return multiplied(x, *quantised_multiplier(real)) + codes_of(layer.makes).zero


def _leaky_relu(layer: Activation, x: np.ndarray) -> np.ndarray:
    read, made = (_single(codes_of(v).scale) for v in (layer.reads[0], layer.makes))
    plus = multiplied(x, *quantised_multiplier(float(read / made)))
    slope = float(read * _single(layer.slope) / made)
    multiplier, shift = quantised_multiplier(slope)
    return np.where(x >= 0, plus, multiplied(x, multiplier, shift)) + codes_of(layer.makes).zero


def _of_fractions(
    function: Callable[[np.ndarray, int], np.ndarray], bits: int, zero: int
) -> Callable[[Activation, np.ndarray], np.ndarray]:
    """A function whose results are from -1 or 0 to 1, with a scale of 2**-bits."""

    def codes(layer: Activation, x: np.ndarray) -> np.ndarray:
        made = codes_of(layer.makes)
        if made.zero != zero or abs(made.scale * 2**bits - 1) > 1e-3:
            return _rounded(layer, x)
        real = float(_single(codes_of(layer.reads[0]).scale)) * 2 ** (31 - INPUT_BITS)
        multiplier, shift = quantised_multiplier(real)
        radius = math.floor((2**INPUT_BITS - 1) * 2.0 ** (31 - INPUT_BITS - shift))
        near = np.abs(x) < radius
        inner = function(multiplied(np.where(near, x, 0), multiplier, shift), INPUT_BITS)
        found = rounding_shift(inner, 31 - bits) + zero
        return np.where(near, found, np.where(x > 0, MOST, LEAST))

    return codes


def _short_multiplier(real: float) -> tuple[int, int]:
    """`quantised_multiplier` with a multiplier of 15 bits."""
    multiplier, shift = quantised_multiplier(real)
    return (2**15 - 1 if multiplier >= 2**31 - 2**15 else (multiplier + 2**15) >> 16), shift


def _short(value: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(value, -(2**15), 2**15 - 1))


def _short_high(a: np.ndarray, b: int) -> np.ndarray:
    """The upper half of 2ab, of 16-bit numbers; see `fixed_point.doubling_high`."""
    return _short((a * b + 2**14) >> 15)


def _hard_swish(layer: Activation, x: np.ndarray) -> np.ndarray:
    read, made = (_single(codes_of(v).scale) for v in (layer.reads[0], layer.makes))
    fine = _single(1 / 128) * read
    multiplier, shift = _short_multiplier(float(fine / made))
    if shift > 0:
        return _rounded(layer, x)
    wide = x << 7
    scaled = _short_high(wide, multiplier)
    part_multiplier, part_shift = _short_multiplier(float(fine / (_single(3) / _single(32768))))
    part = _short(wide << max(part_shift - 1, 0))
    part = _short_high(part, part_multiplier)
    if part_shift > 0:
        part = _short(part << 1)
    part = rounding_shift(part, max(-part_shift, 0))
    part = (part + 2**15) >> 1
    product = part * scaled
    found = np.sign(product) * (np.abs(product) >> 15)  # towards 0
    return rounding_shift(found, -shift) + codes_of(layer.makes).zero


def _sixth(x: np.ndarray) -> np.ndarray:
    return np.clip(x / 6 + 0.5, 0, 1)


_REAL: dict[str, Callable[[Activation, np.ndarray], np.ndarray]] = {
    "identity": lambda layer, x: x,
    "leaky_relu": lambda layer, x: np.where(x < 0, x * float(_single(layer.slope)), x),
    "sigmoid": lambda layer, x: 1 / (1 + np.exp(-x)),
    "tanh": lambda layer, x: np.tanh(x),
    "hard_swish": lambda layer, x: x * _sixth(x),
    "hard_sigmoid": lambda layer, x: _sixth(x),
}


def _real(layer: Activation, x: np.ndarray) -> np.ndarray:
    """float64 of codes without their zero point."""
    real = x * float(_single(codes_of(layer.reads[0]).scale))
    with np.errstate(over="ignore"):
        found: np.ndarray = _REAL[layer.kind](layer, real)
    return found


def _rounded(layer: Activation, x: np.ndarray) -> np.ndarray:
    made = codes_of(layer.makes)
    near = np.clip(_real(layer, x) / float(_single(made.scale)), -1024, 1024)
    return np.array([round_away(float(one)) for one in near]) + made.zero


_KINDS: dict[str, Callable[[Activation, np.ndarray], np.ndarray]] = {
    "identity": _rescaled,
    "leaky_relu": _leaky_relu,
    "sigmoid": _of_fractions(logistic, 8, LEAST),
    "tanh": _of_fractions(tanh, 7, 0),
    "hard_swish": _hard_swish,
    "hard_sigmoid": _rounded,
}


def table(layer: Activation) -> np.ndarray:
    """What each code from -128 on becomes: int8 [256], or float32 where it makes numbers."""
    x = np.arange(256) + LEAST - codes_of(layer.reads[0]).zero
    if layer.makes.codes is None:
        numbers: np.ndarray = np.clip(_real(layer, x), *layer.bounds)
        return numbers.astype(np.float32)
    bounds = bounds_in_codes(layer.makes, layer.bounds)
    return in_codes(_KINDS[layer.kind](layer, x), *bounds)


def computed(layer: Activation, target: Target, codes: np.ndarray) -> np.ndarray:
    """What the layer makes."""
    return table(layer)[codes.astype(np.int64) - LEAST].reshape(layer.makes.shape)


def lowered(layer: Activation, target: Target) -> Lowered:
    """Calls of kernels."""
    read, made, name = layer.reads[0], layer.makes, f"{layer.name}/table"
    slots = (At(read.name), At(name), At(made.name), made.elements)
    constants = {name: table(layer)}
    if made.codes is None:
        return Lowered((Step(lookup_single.NAME, slots),), constants)
    return Lowered((Step(lookup_i8.NAME, slots),), constants, 0, (read.name,))
