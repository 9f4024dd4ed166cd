"""Convolutions of each channel for itself, of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::DepthwiseConvPerChannel`.
"""

from __future__ import annotations

import numpy as np

from headrace.micro.int8.codes import codes_of, shifted_bias
from headrace.micro.int8.convolution import lowered_of, rescaled, scaling
from headrace.micro.kernels import depthwise_i8
from headrace.micro.kernels.requantise import by_lanes
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import Depthwise
from headrace.micro.windows import windows_of
from headrace.targets.target import Target


def by_channel(layer: Depthwise) -> np.ndarray:
    """Weights [made, rows * columns]."""
    return layer.weights.reshape(-1, layer.weights.shape[-1]).T


def computed(layer: Depthwise, target: Target, codes: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    read, made = layer.reads[0], layer.makes
    rows, columns, channels = made.image
    seen = windows_of(
        codes.reshape(read.image), layer.windows, (rows, columns), codes_of(read).zero
    )
    each = seen.repeat(channels // read.image[2], axis=-1)
    sums = np.einsum("abijc,ijc->abc", each, layer.weights.astype(np.int64))
    return rescaled(layer, sums + shifted_bias(layer, by_channel(layer)))


def _can_be_over(layer: Depthwise) -> bool:
    """Whether no row of the result covers what is not yet in the ring."""
    (rows, columns, channels), made = layer.reads[0].image, layer.makes.image
    windows = layer.windows
    ahead = depthwise_i8.ring_rows(windows) - windows.pads[0]
    return all(
        (row + 1) * made[1] * made[2]
        <= min(rows, row * windows.strides[0] + ahead) * columns * channels
        for row in range(made[0])
    )


def lowered(layer: Depthwise, target: Target) -> Lowered:
    """Calls of kernels; of one channel it is like any other convolution."""
    read, made = layer.reads[0], layer.makes
    channels = read.image[2]
    if channels == 1:
        return lowered_of(layer, by_channel(layer), target)
    windows = layer.windows
    kernel = depthwise_i8.kernel_for(target, windows, read.image, made.image)
    by = kernel == depthwise_i8.WINDOWS
    biases = shifted_bias(layer, by_channel(layer))
    factors, ends, constants = scaling(
        layer, by_channel(layer), biases, np.arange(len(biases)), target
    )
    weights, bias = f"{layer.name}/weights", f"{layer.name}/bias"
    constants[weights] = depthwise_i8.packed(by, layer.weights, windows)
    constants[bias] = by_lanes(biases, target)
    more, scratch = depthwise_i8.slots_of(by, read.image, made.image, windows, codes_of(read).zero)
    slots = (
        At(read.name), At(weights), At(made.name), At(bias), *factors, At(SCRATCH), *more, *ends
    )  # fmt: skip
    over = (read.name,) if _can_be_over(layer) else ()
    return Lowered((Step(kernel, slots),), constants, scratch, over)
