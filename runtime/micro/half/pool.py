"""Means and maxima of windows, of real numbers."""

from __future__ import annotations

import numpy as np

from headrace.micro.kernels import pool
from headrace.micro.kernels.numbers import Kind, numbers_of
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Pool
from headrace.targets.target import Target


def computed(layer: Pool, target: Target, x: np.ndarray, *, kind: Kind = "half") -> np.ndarray:
    """What a chip computes, bit for bit."""
    numbers, image = numbers_of(target, kind, wide=True), layer.reads[0].image
    made = layer.makes.image[:2]
    found = pool.reference(layer.kind, numbers, x.reshape(image), layer.windows, made, layer.bounds)
    return found.reshape(layer.makes.shape)


def lowered(layer: Pool, target: Target, *, kind: Kind = "half") -> Lowered:
    """One step."""
    x, c = At(layer.reads[0].name), At(layer.makes.name)
    slots = pool.slots(
        x, c, x, x, layer.reads[0].image, layer.makes.image[:2], layer.windows, layer.bounds
    )
    return Lowered((Step(pool.name_of(layer.kind, kind), tuple(slots)),))
