"""In which numbers a network runs on microcontrollers, and what that makes of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro import half, int8
from headrace.micro.lowered import Lowered
from headrace.micro.network import Layer, MicroNetwork, Value, View
from headrace.targets.target import Target


@dataclass(frozen=True)
class Numbers:
    """How values are kept.

    Attributes:
        name: for people.
        dtype: of a value's elements.
        lowered: what makes calls of kernels of a layer, by its class.
        computed: what computes a layer in numpy, bit for bit as chips do, by its class.
    """

    name: str
    dtype: np.dtype[Any]
    lowered: Mapping[type[Layer], Callable[[Any, Target], Lowered]]
    computed: Mapping[type[Layer], Callable[..., np.ndarray]]


INT8 = Numbers("int8", np.dtype(np.int8), int8.LOWERED, int8.COMPUTED)
HALF = Numbers("half", np.dtype(np.float16), half.LOWERED, half.COMPUTED)


def numbers_of(network: MicroNetwork) -> Numbers:
    """Codes where the network has them, else halves."""
    return INT8 if network.is_quantised else HALF


def dtype_of(network: MicroNetwork, value: Value) -> np.dtype[Any]:
    """Of a value's elements on a chip."""
    return np.dtype(np.int32) if value.sums is not None else numbers_of(network).dtype


def lowered(layer: Layer, target: Target) -> Lowered:
    """A layer as calls of kernels.

    Raises:
        UnsupportedError: there are no kernels for it.
    """
    if isinstance(layer, View):
        return Lowered((), over=(layer.reads[0].name,))
    numbers = INT8 if layer.reads[0].codes is not None else HALF
    if numbers is HALF and not target.floats:
        raise UnsupportedError(
            f"{target.name} has no floating-point unit, and the network is of real numbers: "
            "quantise it to INT8 (`headrace compress x.onnx y.onnx --format int8`)"
        )
    make = numbers.lowered.get(type(layer))
    if make is None:
        raise UnsupportedError(
            f"{layer.name}: there are no kernels of {numbers.name} numbers for it on {target.name}"
        )
    return make(layer, target)


def computed(network: MicroNetwork, target: Target, inputs: Mapping[str, np.ndarray]) -> Any:
    """Values of a network by name, bit for bit as a chip computes them.

    Args:
        inputs: arrays of the values' shapes and types by name.
    """
    numbers = numbers_of(network)
    found = dict(inputs)
    for layer in network.layers:
        given = [found[value.name] for value in layer.reads]
        if isinstance(layer, View):
            found[layer.makes.name] = given[0].reshape(layer.makes.shape)
        else:
            found[layer.makes.name] = numbers.computed[type(layer)](layer, target, *given)
    return found
