"""Convolutions and fully connected layers of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::ConvPerChannel` and `FullyConnected`.
"""

from __future__ import annotations

import numpy as np

from headrace.micro.fixed_point import in_codes, multiplied
from headrace.micro.int8.codes import bounds_in_codes, codes_of, output_multipliers, shifted_bias
from headrace.micro.kernels import convolution_i8, matmul_i8
from headrace.micro.kernels.product_i8 import product_of
from headrace.micro.kernels.requantise import reach_of
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import Convolution, Depthwise
from headrace.micro.windows import windows_of
from headrace.targets.target import Target


def rescaled(layer: Convolution | Depthwise, sums: np.ndarray) -> np.ndarray:
    """int8 codes of sums of products, int64 with channels last."""
    codes = multiplied(sums, *output_multipliers(layer)) + codes_of(layer.makes).zero
    made = in_codes(codes, *bounds_in_codes(layer.makes, layer.bounds))
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


def scaling(
    layer: Convolution | Depthwise,
    weights: np.ndarray,
    bias: np.ndarray,
    order: np.ndarray,
    target: Target,
) -> tuple[tuple[int | At, ...], tuple[int, ...], dict[str, np.ndarray]]:
    """What is in argument blocks of how sums become codes.

    Args:
        weights: [made, others]
        bias: see `headrace.micro.int8.codes.shifted_bias`.
        order: of channels, in which multipliers and shifts are to be.

    Returns:
        Multipliers, shifts to the right and to the left, which may be 0; the zero point, the least
        and the greatest code; and the constants.
    """
    ends = (codes_of(layer.makes).zero, *bounds_in_codes(layer.makes, layer.bounds))
    reach = reach_of(weights, bias)
    multipliers, shifts = (part[order] for part in output_multipliers(layer))
    arrays = matmul_i8.scaling_of(multipliers, shifts, ends, reach, target)
    names = (f"{layer.name}/multipliers", f"{layer.name}/downs", f"{layer.name}/ups")
    pairs = list(zip(names, arrays, strict=True))
    slots = tuple(0 if array is None else At(name) for name, array in pairs)
    return slots, ends, {name: array for name, array in pairs if array is not None}


def lowered(layer: Convolution, target: Target) -> Lowered:
    """Calls of kernels."""
    return lowered_of(layer, layer.weights.reshape(layer.weights.shape[0], -1), target)


def lowered_of(layer: Convolution | Depthwise, weights: np.ndarray, target: Target) -> Lowered:
    """Calls of kernels of a convolution of all channels with weights int8 [made, others]."""
    read, made, of = layer.reads[0], layer.makes, product_of(target)
    bias = shifted_bias(layer, weights)
    factors, ends, constants = scaling(layer, weights, bias, of.order(len(bias)), target)
    name = f"{layer.name}/weights"
    constants[name] = of.packed(weights, bias)
    m, k = weights.shape
    slots: tuple[int | At, ...] = (At(read.name), At(name), At(made.name), *factors, At(SCRATCH))
    if layer.windows.is_pixelwise:
        pixels = made.image[0] * made.image[1]
        slots = (*slots, pixels, of.whole(k), m, k, m, *ends)
        # Sums of some pixels are there before these are written.
        over = (read.name,) if m <= k else ()
        scratch = of.scratch_bytes(k, m, min(pixels, of.rows))
        return Lowered((Step(matmul_i8.kernel_for(pixels), slots),), constants, scratch, over)
    sums = At(SCRATCH, convolution_i8.windows_bytes(target, k))
    geometry = convolution_i8.geometry(read.image, made.image, layer.windows, codes_of(read).zero)
    slots = (*slots, sums, of.whole(k), m, *geometry, *ends)
    scratch = convolution_i8.scratch_bytes(target, k, m)
    return Lowered((Step(convolution_i8.NAME, slots),), constants, scratch)
