"""In which numbers layers run on microcontrollers, and what that makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro import conversion, half, int8, placing
from headrace.micro.lowered import Lowered
from headrace.micro.network import Concatenation, Conversion, Layer, MicroNetwork, Padding, View
from headrace.targets.target import Target


@dataclass(frozen=True)
class Numbers:
    """How layers compute.

    Attributes:
        name: for people.
        lowered: what makes calls of kernels of a layer, by its class.
        computed: what computes a layer in numpy, bit for bit as chips do, by its class.
    """

    name: str
    lowered: Mapping[type[Layer], Callable[[Any, Target], Lowered]]
    computed: Mapping[type[Layer], Callable[..., np.ndarray]]


def _in_single(of: Mapping[type[Layer], Callable[..., Any]]) -> dict[type[Layer], Any]:
    return {layer: partial(function, kind="single") for layer, function in of.items()}


INT8 = Numbers("int8", int8.LOWERED, int8.COMPUTED)
HALF = Numbers("half", half.LOWERED, half.COMPUTED)
SINGLE = Numbers("float32", _in_single(half.LOWERED), _in_single(half.COMPUTED))
BETWEEN = Numbers(
    "other",
    {
        Conversion: conversion.lowered,
        Concatenation: placing.concatenation,
        Padding: placing.padding,
    },
    {
        Conversion: conversion.computed,
        Concatenation: placing.concatenated,
        Padding: placing.padded,
    },
)


def numbers_of(layer: Layer) -> Numbers:
    """By what a layer reads and makes."""
    if type(layer) in BETWEEN.lowered:
        return BETWEEN
    if layer.reads[0].codes is not None:
        return INT8
    return SINGLE if layer.makes.wide else HALF


def kinds_of(network: MicroNetwork) -> list[str]:
    """Names of the numbers that layers compute in."""
    kinds = [numbers_of(layer) for layer in network.layers if not isinstance(layer, View)]
    return list(dict.fromkeys(kind.name for kind in kinds if kind is not BETWEEN))


def lowered(layer: Layer, target: Target) -> Lowered:
    """A layer as calls of kernels.

    Raises:
        UnsupportedError: there are no kernels for it.
    """
    if isinstance(layer, View):
        return Lowered((), over=(layer.reads[0].name,))
    numbers = numbers_of(layer)
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
    found = dict(inputs)
    for layer in network.layers:
        given = [found[value.name] for value in layer.reads]
        if isinstance(layer, View):
            found[layer.makes.name] = given[0].reshape(layer.makes.shape)
        else:
            make = numbers_of(layer).computed[type(layer)]
            found[layer.makes.name] = make(layer, target, *given)
    return found
