"""What a training step keeps in SRAM, by name, and the network that it has become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from headrace.micro.half.convolution import bias_of, weights_of
from headrace.micro.learning import Trained
from headrace.micro.network import OWN, Convolution, Depthwise, Layer, MicroNetwork

WANTED, STATE = f"{OWN}wanted", f"{OWN}loss scale"


def gradient_of(name: str) -> str:
    """The name of the gradient of a value, or of something trained."""
    return f"{OWN}gradient of {name}"


def rest_of(name: str) -> str:
    """The name of what is lost in rounding something trained."""
    return f"{OWN}{name}, rest"


def velocity_of(name: str) -> str:
    """The name of the velocity of something trained."""
    return f"{OWN}{name}, velocity"


def learned(
    network: MicroNetwork, trained: Mapping[str, Trained], state: Mapping[str, np.ndarray]
) -> MicroNetwork:
    """A network with what it learned.

    Args:
        trained: what was, by the name of its layer.
        state: what stayed in SRAM, by the names of `TrainingStep.state`.
    """

    def array(name: str, like: np.ndarray) -> np.ndarray:
        if name not in state:
            return like
        found = state[name].astype(np.float32)
        return found + state[rest_of(name)] if rest_of(name) in state else found

    def of(layer: Layer) -> Layer:
        if layer.name not in trained:
            return layer
        assert isinstance(layer, Convolution | Depthwise)
        weights = array(weights_of(layer), layer.weights)
        if isinstance(layer, Convolution) and weights_of(layer) in state:
            weights = weights.T.reshape(layer.weights.shape)
        return replace(layer, weights=weights, bias=array(bias_of(layer), layer.bias))

    return replace(network, layers=tuple(map(of, network.layers)))
