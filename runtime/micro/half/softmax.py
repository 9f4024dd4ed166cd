"""Softmax of real numbers."""

from __future__ import annotations

import numpy as np

from headrace.micro.kernels import softmax
from headrace.micro.kernels.numbers import Kind, numbers_of
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Softmax
from headrace.targets.target import Target


def computed(layer: Softmax, target: Target, x: np.ndarray, *, kind: Kind = "half") -> np.ndarray:
    """What a chip computes, bit for bit."""
    rows = x.reshape(-1, layer.makes.image[2])
    made = softmax.reference(numbers_of(target, kind, wide=True), rows, layer.beta)
    return made.reshape(layer.makes.shape)


def lowered(layer: Softmax, target: Target, *, kind: Kind = "half") -> Lowered:
    """One step."""
    rows, columns, channels = layer.makes.image
    slots = At(layer.reads[0].name), At(layer.makes.name), rows * columns, channels, layer.beta
    return Lowered((Step(softmax.NAMES[kind], slots),))
