"""Convolutions of real numbers: products of windows, where they lie, and weights [k, made].

k counts a window's pixels line by line, and their channels. Sums begin with the bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.half.windows import WHOLE, Geometry, Tile, bands, only_near
from headrace.micro.kernels import matmul
from headrace.micro.kernels.depthwise import windows_of
from headrace.micro.kernels.numbers import Kind, dtype_of, numbers_of
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Convolution
from headrace.targets.target import Target


def weights_of(layer: Any) -> str:
    """The name of a layer's weights among constants."""
    return f"{layer.name}:weights"


def bias_of(layer: Any) -> str:
    """The same of its bias."""
    return f"{layer.name}:bias"


def geometry_of(layer: Any) -> Geometry:
    """What a layer's windows see."""
    return Geometry(layer.reads[0].image, layer.makes.image[:2], layer.windows)


def parameters(layer: Convolution, kind: Kind) -> dict[str, np.ndarray]:
    """Weights [k, made] and bias [made], as kernels read them."""
    weights = layer.weights.reshape(layer.weights.shape[0], -1).T
    return {
        weights_of(layer): stored(layer, np.ascontiguousarray(weights), kind),
        bias_of(layer): stored(layer, layer.bias, kind),
    }


def stored(layer: Any, array: np.ndarray, kind: Kind) -> np.ndarray:
    """Numbers of a layer as they are kept.

    Raises:
        UnsupportedError: some are too large for that, or not finite.
    """
    most = np.abs(array).max(initial=0)
    if not np.isfinite(most):
        raise UnsupportedError(
            f"{layer.name}: a weight or bias is {most:g}, as of a training that failed; numbers "
            "have to be finite"
        )
    with np.errstate(over="ignore"):
        found: np.ndarray = array.astype(dtype_of(kind))
    if not np.isfinite(found).all():
        raise UnsupportedError(
            f"{layer.name}: a weight or bias is {most:g}, and halves hold up to "
            f"{np.finfo(np.float16).max:g}; quantise the network to INT8"
        )
    return found


def seen_by(layer: Any, x: np.ndarray) -> np.ndarray:
    """What a layer's windows see of an image: [rows, columns, tap lines, taps, channels]."""
    of = geometry_of(layer)
    return windows_of(of.padded(x.reshape(of.image)), layer.windows, *of.made)


def computed(
    layer: Convolution, target: Target, x: np.ndarray, *, kind: Kind = "half"
) -> np.ndarray:
    """What a chip computes, bit for bit."""
    weights, bias = parameters(layer, kind).values()
    seen = seen_by(layer, x).reshape(-1, len(weights))
    made = matmul.reference(numbers_of(target, kind), seen, weights, bias, layer.bounds)
    return made.reshape(layer.makes.shape)


def lowered(
    layer: Convolution, target: Target, *, kind: Kind = "half", tile: Tile = WHOLE
) -> Lowered:
    """Zeros around some rows, then their product, and so on.

    Raises:
        UnsupportedError: windows have gaps between columns.
    """
    only_near(layer, layer.windows)
    size, of = dtype_of(kind).itemsize, geometry_of(layer)
    channels, made = of.image[2], layer.makes.image[2]
    down, across = layer.windows.strides
    parts, scratch = bands(of, At(layer.reads[0].name), kind, most=tile.scratch)
    steps: list[Step] = []
    for band in parts:
        steps += band.steps
        for first, last in tile.columns_of(made):
            c = At(layer.makes.name, (band.first * of.made[1] * made + first) * size)
            block = matmul.Product(
                band.at, At(weights_of(layer), first * size), c, At(bias_of(layer), first * size),
                lines=band.last - band.first, n=of.made[1],
                k_lines=layer.windows.taps[0], k=layer.windows.taps[1] * channels, m=last - first,
                a_row=across * channels * size, a_step=size, a_line=down * band.row,
                a_k_line=layer.windows.dilations[0] * band.row,
                b_row=made * size, c_row=made * size, c_line=of.made[1] * made * size,
                bounds=layer.bounds,
            )  # fmt: skip
            steps.append(Step(matmul.NAMES[kind], block.merged.slots))
    return Lowered(tuple(steps), parameters(layer, kind), scratch)
