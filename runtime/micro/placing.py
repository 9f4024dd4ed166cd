"""Layers that put what they read next to something else, as it is: nothing is computed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from headrace.micro.kernels import place
from headrace.micro.kernels.copying import four_times
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Concatenation, Padding, Value
from headrace.targets.target import Target


def concatenated(layer: Concatenation, target: Target, *values: np.ndarray) -> np.ndarray:
    """What a chip makes."""
    reads = (x.reshape(value.shape) for x, value in zip(values, layer.reads, strict=True))
    return np.concatenate(list(reads), layer.axis)


def concatenation(layer: Concatenation, target: Target) -> Lowered:
    """A step for each value."""

    def inner(value: Value) -> int:
        return math.prod(value.shape[layer.axis :]) * value.dtype.itemsize

    rows, whole, steps, at = math.prod(layer.makes.shape[: layer.axis]), inner(layer.makes), [], 0
    for value in layer.reads:
        n = inner(value)
        slots = (At(value.name), At(layer.makes.name, at), rows, n, n, whole)
        steps.append(Step(place.PLACE, slots))
        at += n
    return Lowered(tuple(steps))


def lowered_in(layer: Concatenation | Padding, target: Target, *, wide: bool) -> Lowered:
    """The same of real numbers that are kept as float32, or as halves."""
    reads = tuple(replace(value, wide=wide) for value in layer.reads)
    layer = replace(layer, reads=reads, makes=replace(layer.makes, wide=wide))
    if isinstance(layer, Padding):
        return padding(layer, target)
    return concatenation(layer, target)


def _zero(value: Value) -> int:
    return 0 if value.codes is None else value.codes.zero


def padded(layer: Padding, target: Target, x: np.ndarray) -> np.ndarray:
    """What a chip makes."""
    pads = [*zip(layer.before, layer.after, strict=True), (0, 0)]
    image = x.reshape(layer.reads[0].image)
    return np.pad(image, pads, constant_values=_zero(layer.makes))


def padding(layer: Padding, target: Target) -> Lowered:
    """Zeros, and the image among them."""
    read, made = layer.reads[0], layer.makes
    pixel = made.image[2] * made.dtype.itemsize
    row, given = made.image[1] * pixel, read.image[1] * pixel
    first = layer.before[0] * row + layer.before[1] * pixel
    slots = (At(read.name), At(made.name, first), read.image[0], given, given, row)
    zeros = Step(place.FILL, (At(made.name), made.n_bytes, four_times(_zero(made))))
    return Lowered((zeros, Step(place.PLACE, slots)))
