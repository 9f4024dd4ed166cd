"""Products of two values of real numbers.

A factor for each channel is what a depthwise convolution of single pixels has as weights.
"""

from __future__ import annotations

import numpy as np

from headrace.micro.half import elementwise
from headrace.micro.kernels import depthwise
from headrace.micro.kernels.numbers import Kind, dtype_of, numbers_of
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Multiply
from headrace.targets.target import Target


def computed(
    layer: Multiply, target: Target, x: np.ndarray, factor: np.ndarray, *, kind: Kind = "half"
) -> np.ndarray:
    """What a chip computes, bit for bit."""
    if not layer.is_by_channel:
        return elementwise.computed(layer, target, x, factor, kind=kind)
    seen = x.reshape(layer.reads[0].image)[:, :, None, None]
    weights = factor.reshape(1, 1, -1)
    zeros = np.zeros(weights.shape[2], x.dtype)
    numbers = numbers_of(target, kind)
    found = depthwise.reference(numbers, seen, weights, zeros, layer.bounds)
    return found.reshape(layer.makes.shape)


def lowered(layer: Multiply, target: Target, *, kind: Kind = "half") -> Lowered:
    """One step."""
    if not layer.is_by_channel:
        return elementwise.lowered(layer, target, kind=kind)
    (rows, columns, channels), size = layer.makes.image, dtype_of(kind).itemsize
    name, pixel = f"{layer.name}/zeros", channels * size
    block = depthwise.Convolved(
        At(layer.reads[0].name), At(layer.reads[1].name), At(name), At(layer.makes.name),
        rows=rows, columns=columns, channels=channels, lines=1, taps=1,
        x_tap=pixel, x_line=pixel, w_tap=pixel, w_line=pixel, x_pixel=pixel,
        x_row=columns * pixel, c_pixel=pixel, c_row=columns * pixel, bounds=layer.bounds,
    )  # fmt: skip
    constants = {name: np.zeros(channels, dtype_of(kind))}
    return Lowered((Step(depthwise.NAMES[kind], block.slots),), constants)
