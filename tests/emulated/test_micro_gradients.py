"""Gradients of training steps beside float64's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_micro_half import FUNCTIONS, plain, windows_seen
from training_networks import (
    NETS,
    TARGETS,
    everything,
    inputs_of,
    memory_of,
    numbers_in,
    small_pools,
)

from headrace.micro.half import machine
from headrace.micro.half.convolution import bias_of, weights_of
from headrace.micro.learning import Learning, with_weights
from headrace.micro.network import Convolution, Depthwise, MicroNetwork, Pool, Softmax, Value
from headrace.micro.training import training_step
from headrace.micro.training_state import STATE, gradient_of
from headrace.targets.target import Target


def _scattered(layer: Any, seen: np.ndarray) -> np.ndarray:
    """Gradients of pixels from those of [rows, columns, lines, taps, channels] of windows."""
    of, found = layer.windows, np.zeros(layer.reads[0].image)
    for i, j, line, tap in np.ndindex(seen.shape[:4]):
        row = i * of.strides[0] - of.pads[0] + line * of.dilations[0]
        column = j * of.strides[1] - of.pads[1] + tap * of.dilations[1]
        if 0 <= row < found.shape[0] and 0 <= column < found.shape[1]:
            found[row, column] += seen[i, j, line, tap]
    return found


def _pool_backward(layer: Pool, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    seen = windows_seen(layer, x, np.nan)
    there = ~np.isnan(seen)
    if layer.kind == "mean":
        given = there / there.sum((2, 3), keepdims=True)
    else:
        flat = np.where(there, seen, -np.inf).reshape(*seen.shape[:2], -1, seen.shape[4])
        first = flat.argmax(2)[:, :, None] == np.arange(flat.shape[2])[:, None]
        given = first.reshape(seen.shape)
    return _scattered(layer, given * dy[:, :, None, None])


def exact_gradients(network: MicroNetwork, x: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Gradients of cross entropy in float64, by the chain rule."""
    values = {"x": x.astype(np.float64)}
    layers = list(network.layers)
    if not isinstance(layers[-1], Softmax):
        logits = layers[-1].makes
        layers.append(Softmax("p", (logits,), Value("p", logits.shape, None)))
    for layer in layers:
        made = FUNCTIONS[type(layer)](layer, *(values[v.name] for v in layer.reads))
        values[layer.makes.name] = made.reshape(layer.makes.shape)
    last = layers.pop()
    error = values[last.makes.name] - wanted.reshape(last.makes.shape)
    errors = {last.reads[0].name: error}
    found: dict[str, Any] = {}
    for layer in reversed(layers):
        y, dy = values[layer.makes.name], errors[layer.makes.name]
        if hasattr(layer, "bounds"):
            dy = dy * ((layer.bounds[0] < y) & (y < layer.bounds[1]))
        dy, given = dy.reshape(layer.makes.image), values[layer.reads[0].name]
        into = [dy] * len(layer.reads)
        if isinstance(layer, Convolution):
            seen = windows_seen(layer, given)
            gradient = np.einsum("ijltc,ijm->mltc", seen, dy)
            found[weights_of(layer)] = gradient.reshape(len(gradient), -1).T
            into = [_scattered(layer, np.einsum("mltc,ijm->ijltc", layer.weights, dy))]
        elif isinstance(layer, Depthwise):
            seen = windows_seen(layer, given)
            found[weights_of(layer)] = np.einsum("ijltc,ijc->ltc", seen, dy)
            into = [_scattered(layer, np.einsum("ltc,ijc->ijltc", layer.weights, dy))]
        elif isinstance(layer, Pool):
            into = [_pool_backward(layer, given, dy)]
        if isinstance(layer, Convolution | Depthwise):
            found[bias_of(layer)] = dy.sum((0, 1))
        for value, one in zip(layer.reads, into, strict=True):
            errors[value.name] = errors.get(value.name, 0.0) + one.reshape(value.shape)
    return found


def rounded(network: MicroNetwork) -> MicroNetwork:
    """With weights that halves hold, which cannot be told from those of a file."""

    def of(layer: Any) -> Any:
        if not isinstance(layer, Convolution | Depthwise):
            return layer
        exact = {name: getattr(layer, name).astype(np.float16) for name in ("weights", "bias")}
        return replace(layer, **{name: one.astype(np.float64) for name, one in exact.items()})

    return replace(network, layers=tuple(of(layer) for layer in network.layers))


def gradients_of(
    network: MicroNetwork, target: Target, kind: Any, x: np.ndarray, wanted: np.ndarray
) -> dict[str, np.ndarray]:
    """Gradients of everything that is trained, as numpy says that a chip computes them."""
    how = Learning(everything(network), 1.0, scale=256.0, good_steps=1000)
    step = training_step(network, target, how, kind=kind)
    memory = memory_of(step, x, wanted)
    machine.run(step.steps[: step.phases.index("update")], target, memory)
    scale = numbers_in(memory, STATE, step.state[STATE])[0]
    return {
        name: numbers_in(memory, gradient_of(name), array).astype(np.float64) / scale
        for name, array in step.state.items()
        if name != STATE and not name.endswith(", rest")
    }


@pytest.mark.parametrize("which", NETS)
@pytest.mark.parametrize(
    ("target_name", "kind", "most"),
    [("cortex-m4f", "half", 1e-2), ("cortex-m55", "half", 1e-2), ("cortex-m4f", "single", 1e-5)],
)
def test_gradients_beside_float64(target_name: str, kind: Any, most: float, which: str) -> None:
    network, target = rounded(NETS[which]()), TARGETS[target_name]
    x, wanted = inputs_of(network, np.float16 if kind == "half" else np.float32)
    exact = exact_gradients(network, x, wanted)
    found = gradients_of(network, target, kind, x, wanted)
    assert set(found) == set(exact)
    for name, gradient in exact.items():
        error = np.linalg.norm(found[name] - gradient.reshape(found[name].shape))
        assert error < most * np.linalg.norm(gradient), name


def test_the_chain_rule_is_right() -> None:
    """The gradients above beside differences of the loss."""
    network = rounded(small_pools())
    x, wanted = inputs_of(network, np.float64)
    exact = exact_gradients(network, x, wanted)

    def loss() -> float:
        logits = plain(network, x).reshape(-1)
        return float(np.log(np.exp(logits - logits @ wanted).sum()))

    rng = np.random.default_rng(6)
    for layer in with_weights(network):
        for array, name in ((layer.weights, weights_of(layer)), (layer.bias, bias_of(layer))):
            way = rng.standard_normal(array.shape)
            before, values = array.copy(), []
            for by in (1e-6, -1e-6):
                array[...] = before + by * way
                values.append(loss())
            array[...] = before
            turned = way.reshape(len(way), -1).T if way.ndim == 4 else way
            expected = (exact[name] * turned.reshape(exact[name].shape)).sum()
            assert abs((values[0] - values[1]) / 2e-6 - expected) < 1e-5 * np.linalg.norm(
                exact[name]
            )
