"""Convolutions and fully connected layers of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::ConvPerChannel` and `FullyConnected`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.micro.fixed_point import multiplied
from headrace.micro.int8.codes import bounds_in_codes, codes_of, output_multipliers, shifted_bias
from headrace.micro.kernels import convolution_i8, matmul_i8
from headrace.micro.kernels.requantise import by_lanes
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import Convolution, Depthwise
from headrace.micro.windows import windows_of
from headrace.targets.target import Target


def rescaled(layer: Convolution | Depthwise, sums: np.ndarray) -> np.ndarray:
    """int8 codes of sums of products, int64 with channels last."""
    codes = multiplied(sums, *output_multipliers(layer)) + codes_of(layer.makes).zero
    made = np.clip(codes, *bounds_in_codes(layer.makes, layer.bounds)).astype(np.int8)
    return made.reshape(layer.makes.shape)


def computed(layer: Convolution, target: Target, codes: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    read, made = layer.reads[0], layer.makes
    rows, columns, channels = made.image
    seen = windows_of(
        codes.reshape(read.image), layer.windows, (rows, columns), codes_of(read).zero
    )
    weights = layer.weights.reshape(channels, -1)
    # Products of bytes add up exactly in float64, which BLAS is fast with.
    sums = seen.reshape(rows * columns, -1).astype(np.float64) @ weights.T.astype(np.float64)
    return rescaled(layer, sums.astype(np.int64) + shifted_bias(layer, weights))


@dataclass(frozen=True)
class Scaling:
    """What is in argument blocks of how sums become codes, and the constants that it names.

    Attributes:
        channels: bias, multipliers, shifts to the right and to the left, which may be 0.
        ends: zero point, the least and the greatest code.
    """

    channels: tuple[int | At, ...]
    ends: tuple[int, ...]
    constants: dict[str, np.ndarray]


def scaling(layer: Convolution | Depthwise, weights: np.ndarray, target: Target) -> Scaling:
    """Of a layer with weights int8 [made, others]."""
    factors, downs, ups = matmul_i8.scaling_of(*output_multipliers(layer), target)
    bias = by_lanes(shifted_bias(layer, weights), target)
    arrays = {"bias": bias, "multipliers": factors, "downs": downs, "ups": ups}
    constants = {f"{layer.name}/{k}": v for k, v in arrays.items() if v is not None}
    channels = tuple(0 if v is None else At(f"{layer.name}/{k}") for k, v in arrays.items())
    ends = (codes_of(layer.makes).zero, *bounds_in_codes(layer.makes, layer.bounds))
    return Scaling(channels, ends, constants)


def lowered(layer: Convolution, target: Target) -> Lowered:
    """Calls of kernels."""
    return lowered_of(layer, layer.weights.reshape(layer.weights.shape[0], -1), target)


def lowered_of(layer: Convolution | Depthwise, weights: np.ndarray, target: Target) -> Lowered:
    """Calls of kernels of a convolution of all channels with weights int8 [made, others]."""
    read, made = layer.reads[0], layer.makes
    of, name = scaling(layer, weights, target), f"{layer.name}/weights"
    constants = {**of.constants, name: matmul_i8.packed(weights, target)}
    m, k = weights.shape
    whole = constants[name].shape[1]
    ends, rows, columns = (At(read.name), At(name), At(made.name)), *made.image[:2]
    if layer.windows.is_pixelwise:
        slots = (*ends, *of.channels, At(SCRATCH), rows * columns, whole, m, k, m, *of.ends)
        # Sums of some pixels are there before these are written.
        over = (read.name,) if m <= k else ()
        scratch = matmul_i8.sums_bytes(target, m)
        return Lowered((Step(matmul_i8.NAME, slots),), constants, scratch, over)
    scratch = convolution_i8.scratch_bytes(target, k, m)
    sums = At(SCRATCH, scratch - matmul_i8.sums_bytes(target, m))
    geometry = convolution_i8.geometry(read.image, made.image, layer.windows, codes_of(read).zero)
    slots = (*ends, *of.channels, At(SCRATCH), sums, whole, m, *geometry, *of.ends)
    return Lowered((Step(convolution_i8.NAME, slots),), constants, scratch)
