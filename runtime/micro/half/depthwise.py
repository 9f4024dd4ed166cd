"""Convolutions of each channel for itself, of real numbers."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from headrace.micro.half import convolution
from headrace.micro.half.convolution import bias_of, geometry_of, seen_by, stored, weights_of
from headrace.micro.half.windows import WHOLE, Tile, bands
from headrace.micro.kernels import depthwise
from headrace.micro.kernels.numbers import Kind, dtype_of, numbers_of
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Convolution, Depthwise, Layer
from headrace.targets.target import Target


def dense(layer: Layer) -> Layer:
    """A layer that makes several channels of one as a convolution, whose other weights are 0."""
    if not isinstance(layer, Depthwise) or layer.reads[0].image[2] == layer.weights.shape[2]:
        return layer
    *taps, made = layer.weights.shape
    read = layer.reads[0].image[2]
    weights = np.zeros((made, *taps, read), layer.weights.dtype)
    channels = np.arange(made)
    weights[channels, :, :, channels // (made // read)] = layer.weights.transpose(2, 0, 1)
    kept = {
        one.name: getattr(layer, one.name)
        for one in fields(layer)
        if one.name not in ("weights", "whole")
    }
    return Convolution(**kept, weights=weights)


def suits_down(made: tuple[int, int]) -> bool:
    """Whether so many rows and columns take fewer blocks of sums from row to row.

    Kernels take 4, 2 and 1 neighbours of a line.
    """

    def blocks(lines: int, n: int) -> int:
        return lines * (n // 4 + n % 4 // 2 + n % 2)

    return blocks(made[1], made[0]) < blocks(made[0], made[1])


def goes_down(layer: Depthwise) -> bool:
    """Whether sums that are added up at once, and taps in order, go from row to row.

    Some rows of a layer go as all of them do.
    """
    return suits_down(layer.makes.image[:2] if layer.whole is None else layer.whole)


def parameters(layer: Depthwise, kind: Kind) -> dict[str, np.ndarray]:
    """Weights [tap lines, taps, made] and bias [made], as kernels read them."""
    return {
        weights_of(layer): stored(layer, layer.weights, kind),
        bias_of(layer): stored(layer, layer.bias, kind),
    }


def computed(layer: Depthwise, target: Target, x: np.ndarray, *, kind: Kind = "half") -> np.ndarray:
    """What a chip computes, bit for bit."""
    other = dense(layer)
    if isinstance(other, Convolution):
        return convolution.computed(other, target, x, kind=kind)
    weights, bias = parameters(layer, kind).values()
    numbers, seen = numbers_of(target, kind), seen_by(layer, x)
    if goes_down(layer):
        seen, weights = seen.transpose(1, 0, 3, 2, 4), weights.transpose(1, 0, 2)
    made = depthwise.reference(numbers, seen, weights, bias, layer.bounds)
    if goes_down(layer):
        made = made.transpose(1, 0, 2)
    return np.ascontiguousarray(made).reshape(layer.makes.shape)


def lowered(
    layer: Depthwise, target: Target, *, kind: Kind = "half", tile: Tile = WHOLE
) -> Lowered:
    """Zeros around some rows, then their windows, and so on."""
    other = dense(layer)
    if isinstance(other, Convolution):
        return convolution.lowered(other, target, kind=kind, tile=tile)
    size, of = dtype_of(kind).itemsize, geometry_of(layer)
    pixel, (lines, taps) = of.image[2] * size, layer.windows.taps
    down, across = layer.windows.strides
    parts, scratch = bands(of, At(layer.reads[0].name), kind, most=tile.scratch)
    steps: list[Step] = []
    for band in parts:
        block = depthwise.Convolved(
            band.at, At(weights_of(layer)), At(bias_of(layer)),
            At(layer.makes.name, band.first * of.made[1] * pixel),
            rows=band.last - band.first, columns=of.made[1], channels=of.image[2], lines=lines,
            taps=taps, x_tap=layer.windows.dilations[1] * pixel,
            x_line=layer.windows.dilations[0] * band.row, w_tap=pixel, w_line=taps * pixel,
            x_pixel=across * pixel, x_row=down * band.row, c_pixel=pixel,
            c_row=of.made[1] * pixel, bounds=layer.bounds,
        )  # fmt: skip
        if goes_down(layer):
            block = block.turned
        steps += [*band.steps, Step(depthwise.NAMES[kind], block.slots)]
    return Lowered(tuple(steps), parameters(layer, kind), scratch)
