"""Sums and products of two values and functions of each element, of real numbers."""

from __future__ import annotations

import numpy as np

from headrace.micro.kernels import elementwise
from headrace.micro.kernels.numbers import UNBOUNDED, Kind
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Activation, Add, Multiply
from headrace.targets.target import Target


def _operations(layer: Add | Multiply | Activation) -> list[tuple[str, tuple[float, float]]]:
    """Operations of kernels with their constants, one after the other."""
    if isinstance(layer, (Add, Multiply)):
        return [("add" if isinstance(layer, Add) else "multiply", layer.bounds)]
    if layer.kind != "leaky_relu":
        return [(layer.kind, layer.bounds)]
    bounded = [("identity", layer.bounds)] if layer.bounds != UNBOUNDED else []
    return [(layer.kind, (layer.slope, 0.0)), *bounded]


def computed(
    layer: Add | Multiply | Activation, target: Target, *values: np.ndarray, kind: Kind = "half"
) -> np.ndarray:
    """What a chip computes, bit for bit."""
    made = values[0]
    for operation, constants in _operations(layer):
        numbers = elementwise.arithmetic_of(target, kind, operation)
        made = elementwise.reference(operation, numbers, made, values[-1], constants)
    return made.reshape(layer.makes.shape)


def lowered(layer: Add | Multiply | Activation, target: Target, *, kind: Kind = "half") -> Lowered:
    """One step, or one and its bounds, whose result may lie over what it reads."""
    names, made = tuple(value.name for value in layer.reads), At(layer.makes.name)
    steps, first, n = list[Step](), At(names[0]), layer.makes.elements
    for operation, constants in _operations(layer):
        name = elementwise.name_of(operation, kind)
        steps.append(Step(name, (first, At(names[-1]), made, n, *constants)))
        first = made
    return Lowered(tuple(steps), over=names)
