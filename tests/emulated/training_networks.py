"""Small networks that learn, and their training steps' memory in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from test_micro_half import NETWORKS, Layers

from headrace.micro.learning import Trained, with_weights
from headrace.micro.network import MicroNetwork, Windows
from headrace.micro.training import TrainingStep
from headrace.targets.target import microcontrollers

TARGETS = microcontrollers()


def small_pools() -> MicroNetwork:
    """Depthwise layers, strides in each way, and both pools."""
    of = Layers(12, 7, 3).convolution(8, Windows((4, 3), (2, 2), (1, 1)), 1, bounds=(0.0, 6.0))
    of.depthwise(Windows((3, 3), pads=(1, 1)), 1, bounds=(0.0, np.inf))
    of.convolution(11, Windows()).pool("most", Windows((2, 2), (1, 1), (1, 0)), 1)
    of.depthwise(Windows((3, 2), (2, 1), (1, 0)), 1).pool("mean", Windows((2, 1), (2, 1)))
    return of.activation("identity", bounds=(-1.0, 1.0)).convolution(4, Windows((2, 4))).network()


NETS = {"residual": NETWORKS["residual"], "pools": small_pools}


def everything(network: MicroNetwork) -> dict[str, Trained]:
    return {layer.name: Trained() for layer in with_weights(network)}


def memory_of(step: TrainingStep, x: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
    """Memory of a training step in numpy, its input and what is wanted in it."""
    memory = {name: np.zeros(n + 16, np.uint8) for name, n in step.values.items()}
    for arrays in (step.constants, step.state):
        for name, array in arrays.items():
            data = np.frombuffer(array.tobytes() + bytes(64), np.uint8)
            memory[name] = data.copy()
    put_inputs(memory, step, x, wanted)
    return memory


def put_inputs(
    memory: dict[str, np.ndarray], step: TrainingStep, x: np.ndarray, wanted: np.ndarray
) -> None:
    for name, array in zip(step.given, (x, wanted), strict=True):
        data = np.frombuffer(array.tobytes(), np.uint8)
        memory[name][: data.size] = data


def inputs_of(network: MicroNetwork, dtype: Any, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(network.inputs[0].value.shape).astype(dtype)
    wanted = np.zeros(network.layers[-1].makes.elements, dtype)
    wanted[rng.integers(wanted.size)] = 1
    return x, wanted


def numbers_in(memory: dict[str, np.ndarray], name: str, like: np.ndarray) -> np.ndarray:
    return memory[name][: like.nbytes].view(like.dtype).reshape(like.shape)
