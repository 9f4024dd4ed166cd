"""Fully connected layers at a network's end whose result stays int32 sums of products."""

from __future__ import annotations

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.int8.codes import codes_of
from headrace.micro.kernels import sums_i8
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Sums
from headrace.targets.target import Target


def _bias(layer: Sums) -> np.ndarray:
    """With which products of codes themselves add up to those of numbers.

    Raises:
        UnsupportedError: sums may be too large.
    """
    weights = layer.weights.astype(np.int64)
    bias = layer.bias.astype(np.int64) - codes_of(layer.reads[0]).zero * weights.sum(1)
    if (np.abs(bias) + 128 * np.abs(weights).sum(1) >= 2**31).any():
        raise UnsupportedError(f"layer {layer.name}: its sums may be more than 32 bits hold")
    found: np.ndarray = bias.astype(np.int32)
    return found


def computed(layer: Sums, target: Target, codes: np.ndarray) -> np.ndarray:
    """int32 sums."""
    return sums_i8.reference(codes.reshape(-1), layer.weights, _bias(layer))


def lowered(layer: Sums, target: Target) -> Lowered:
    """A call of a kernel."""
    weights, bias = f"{layer.name}/weights", f"{layer.name}/bias"
    slots = (
        At(layer.reads[0].name), At(weights), At(bias), At(layer.makes.name), *layer.weights.shape,
    )  # fmt: skip
    constants = {weights: layer.weights, bias: _bias(layer)}
    return Lowered((Step(sums_i8.NAME, slots),), constants)
