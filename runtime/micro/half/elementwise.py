"""Sums and products of two values and functions of each element, of real numbers."""

from __future__ import annotations

import numpy as np

from headrace.micro.kernels import elementwise
from headrace.micro.kernels.numbers import Kind
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Activation, Add, Multiply
from headrace.targets.target import Target


def _operation(layer: Add | Multiply | Activation) -> tuple[str, tuple[float, float]]:
    """The kernel's operation and its constants."""
    if isinstance(layer, (Add, Multiply)):
        return "add" if isinstance(layer, Add) else "multiply", layer.bounds
    return layer.kind, (layer.slope, 0.0) if layer.kind == "leaky_relu" else layer.bounds


def computed(
    layer: Add | Multiply | Activation, target: Target, *values: np.ndarray, kind: Kind = "half"
) -> np.ndarray:
    """What a chip computes, bit for bit."""
    operation, constants = _operation(layer)
    numbers = elementwise.arithmetic_of(target, kind, operation)
    made = elementwise.reference(operation, numbers, values[0], values[-1], constants)
    return made.reshape(layer.makes.shape)


def lowered(layer: Add | Multiply | Activation, target: Target, *, kind: Kind = "half") -> Lowered:
    """One step, whose result may lie over what it reads."""
    operation, constants = _operation(layer)
    names = tuple(value.name for value in layer.reads)
    slots = (At(names[0]), At(names[-1]), At(layer.makes.name), layer.makes.elements, *constants)
    return Lowered((Step(elementwise.name_of(operation, kind), slots),), over=names)
