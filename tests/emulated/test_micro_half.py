"""Layers of real numbers on emulated chips, bit for bit what numpy says they compute."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import numpy as np
import pytest

from headrace.errors import UnsupportedError
from headrace.micro import half
from headrace.micro.arithmetic import computed
from headrace.micro.emulate import Emulated
from headrace.micro.half.windows import Tile
from headrace.micro.network import (
    Activation,
    Add,
    Convolution,
    Depthwise,
    Layer,
    MicroNetwork,
    Multiply,
    Pool,
    Port,
    Softmax,
    Value,
    View,
    Windows,
)
from headrace.micro.plan import plan_network
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import microcontrollers

TARGETS = microcontrollers()


class Layers:
    """A network that is built layer by layer."""

    def __init__(self, *shape: int) -> None:
        self.rng = np.random.default_rng(3)
        self.given = self.last = Value("x", shape, None)
        self.layers: list[Layer] = []

    def _next(self, *shape: int) -> tuple[str, tuple[Value, ...], Value]:
        name, before = f"layer {len(self.layers)}", self.last
        self.last = Value(f"y{len(self.layers)}", shape, None)
        return name, (before,), self.last

    def _numbers(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:3]))

    def _made(self, windows: Windows, below: int) -> tuple[int, ...]:
        return tuple(
            (n + before + below - (taps - 1) * dilation - 1) // stride + 1
            for n, before, taps, dilation, stride in zip(
                self.last.image[:2], windows.pads, windows.taps, windows.dilations,
                windows.strides, strict=True,
            )
        )  # fmt: skip

    def convolution(self, made: int, windows: Windows, below: int = 0, **more: Any) -> Layers:
        channels = self.last.image[2]
        first = self._next(*self._made(windows, below), made)
        weights = self._numbers(made, *windows.taps, channels)
        self.layers.append(Convolution(*first, weights, self._numbers(made), None, windows, **more))
        return self

    def depthwise(self, windows: Windows, below: int = 0, times: int = 1, **more: Any) -> Layers:
        channels = self.last.image[2] * times
        first = self._next(*self._made(windows, below), channels)
        weights = self._numbers(*windows.taps, channels)
        self.layers.append(
            Depthwise(*first, weights, self._numbers(channels), None, windows, **more)
        )
        return self

    def pool(self, kind: Any, windows: Windows, below: int = 0) -> Layers:
        first = self._next(*self._made(windows, below), self.last.image[2])
        self.layers.append(Pool(*first, kind, windows))
        return self

    def activation(self, kind: Any, **more: Any) -> Layers:
        self.layers.append(Activation(*self._next(*self.last.shape), kind, **more))
        return self

    def add(self, other: Value, **more: Any) -> Layers:
        name, reads, makes = self._next(*self.last.shape)
        self.layers.append(Add(name, (*reads, other), makes, **more))
        return self

    def multiply(self, other: Value, **more: Any) -> Layers:
        name, reads, makes = self._next(*self.last.shape)
        self.layers.append(Multiply(name, (*reads, other), makes, **more))
        return self

    def softmax(self, beta: float = 1.0) -> Layers:
        self.layers.append(Softmax(*self._next(*self.last.shape), beta))
        return self

    def view(self, *shape: int) -> Layers:
        self.layers.append(View(*self._next(*shape)))
        return self

    def network(self) -> MicroNetwork:
        ports = [Port(value.name, (1, *value.shape), value) for value in (self.given, self.last)]
        return MicroNetwork("test", tuple(self.layers), (ports[0],), (ports[1],))


def small_residual() -> MicroNetwork:
    """Every layer of residual networks: two ways, the shorter with a stride."""
    of = Layers(10, 6, 3).convolution(8, Windows((3, 3), pads=(1, 1)), 1, bounds=(0.0, np.inf))
    before = of.last
    of.convolution(16, Windows((3, 3), (2, 2), (0, 0)), 1, bounds=(0.0, 6.0))
    of.convolution(16, Windows((3, 3), pads=(1, 1)), 1)
    longer, of.last = of.last, before
    of.convolution(16, Windows((1, 1), (2, 2))).add(longer, bounds=(0.0, np.inf))
    of.pool("mean", Windows(of.last.image[:2])).view(16)
    return of.convolution(10, Windows()).softmax().network()


def small_depthwise() -> MicroNetwork:
    """Layers of networks with a convolution for each channel, and all other functions."""
    of = Layers(17, 5, 1).convolution(12, Windows((4, 3), (2, 1), (1, 1)), 1).activation("tanh")
    of.depthwise(Windows((3, 3), pads=(1, 1)), 1, bounds=(0.0, 6.0)).convolution(19, Windows())
    of.activation("hard_swish").depthwise(Windows((3, 2), (2, 2), (1, 0)), times=2)
    image = of.last
    of.pool("mean", Windows(image.image[:2])).activation("hard_sigmoid")
    factor, of.last = of.last, image
    of.multiply(factor, bounds=(-4.0, 4.0)).multiply(image)
    of.activation("leaky_relu", slope=0.125).pool("most", Windows((2, 2), (1, 1), (1, 1)))
    of.activation("sigmoid").convolution(5, Windows((2, 1), dilations=(2, 1)))
    return of.activation("hard_sigmoid").network()


NETWORKS = {"residual": small_residual, "depthwise": small_depthwise}


@pytest.mark.parametrize("which", NETWORKS)
@pytest.mark.parametrize(
    "target_name", ["cortex-m3", "cortex-m4f", "cortex-m55", "rv32-zfh", "rv32-zvfh"]
)
def test_a_network_bit_for_bit(target_name: str, which: str) -> None:
    network, target = NETWORKS[which](), TARGETS[target_name]
    if reason := why_not(target.machines[0]):
        pytest.skip(reason)
    x = np.random.default_rng(4).standard_normal(network.inputs[0].value.shape)
    given = {"x": x.astype(np.float16)}
    (name,) = (port.value.name for port in network.outputs)
    expected = computed(network, target, given)[name]
    assert np.isfinite(expected).all() and len(set(expected.ravel())) > 3
    with tempfile.TemporaryDirectory() as folder:
        (found,) = Emulated(plan_network(network, target).program, folder).run([given])
    assert found[name].tobytes() == expected.tobytes()
    exact = plain(network, x)
    assert np.abs(expected - exact).max() < 0.02 * np.abs(exact).max()


def plain(network: MicroNetwork, x: np.ndarray) -> np.ndarray:
    """The network in float64, by the definitions of its layers."""
    values = {"x": x}
    for layer in network.layers:
        reads = [values[value.name] for value in layer.reads]
        values[layer.makes.name] = FUNCTIONS[type(layer)](layer, *reads).reshape(layer.makes.shape)
    return values[network.outputs[0].value.name]


def windows_seen(layer: Any, x: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """[rows, columns, lines, taps, channels] of all windows, pixels outside filled."""
    rows, columns, channels = layer.reads[0].image
    of, made = layer.windows, layer.makes.image
    found = np.full((*made[:2], *of.taps, channels), fill)
    for i, j, line, tap in np.ndindex(found.shape[:4]):
        row = i * of.strides[0] - of.pads[0] + line * of.dilations[0]
        column = j * of.strides[1] - of.pads[1] + tap * of.dilations[1]
        if 0 <= row < rows and 0 <= column < columns:
            found[i, j, line, tap] = x.reshape(rows, columns, channels)[row, column]
    return found


def _bounded(layer: Any, x: np.ndarray) -> np.ndarray:
    return np.clip(x, *layer.bounds)


def _depthwise(layer: Depthwise, x: np.ndarray) -> np.ndarray:
    seen = windows_seen(layer, x)
    seen = np.repeat(seen, layer.weights.shape[2] // seen.shape[4], 4)
    return _bounded(layer, np.einsum("ijltc,ltc->ijc", seen, layer.weights) + layer.bias)


def _pool(layer: Pool, x: np.ndarray) -> np.ndarray:
    seen = windows_seen(layer, x, np.nan)
    return _bounded(layer, (np.nanmean if layer.kind == "mean" else np.nanmax)(seen, (2, 3)))


def _function(layer: Activation, x: np.ndarray) -> np.ndarray:
    functions = {
        "tanh": np.tanh,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
        "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
        "leaky_relu": lambda x: np.where(x < 0, layer.slope * x, x),
        "identity": lambda x: x,
    }
    return _bounded(layer, functions[layer.kind](x))


def _softmax(layer: Softmax, x: np.ndarray) -> np.ndarray:
    e = np.exp(layer.beta * (x - x.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


FUNCTIONS: dict[type[Layer], Any] = {
    Convolution: lambda layer, x: _bounded(
        layer, np.einsum("ijltc,mltc->ijm", windows_seen(layer, x), layer.weights) + layer.bias
    ),
    Depthwise: _depthwise,
    Pool: _pool,
    Add: lambda layer, x, y: _bounded(layer, x + y),
    Multiply: lambda layer, x, y: _bounded(layer, x * y),
    Activation: _function,
    Softmax: _softmax,
    View: lambda layer, x: x,
}


def test_all_layers_are_here() -> None:
    used = {type(layer) for build in NETWORKS.values() for layer in build().layers}
    assert used - {View} == set(half.LOWERED) == set(half.COMPUTED)


def test_scratch_of_few_rows_gives_the_same() -> None:
    """Zeros around an image a few rows at a time: other steps, the same bits."""
    network, target = small_residual(), TARGETS["cortex-m55"]
    layer = network.layers[0]
    whole, some = (
        half.LOWERED[Convolution](layer, target, tile=Tile(most)) for most in (1 << 20, 200)
    )
    assert len(whole.steps) == 2 < len(some.steps)
    assert some.scratch_bytes < whole.scratch_bytes


def test_columns_with_gaps_are_refused() -> None:
    layer = Layers(9, 9, 3).convolution(8, Windows((3, 3), dilations=(1, 2))).layers[0]
    with pytest.raises(UnsupportedError, match="layer 0: windows whose columns are 2 apart"):
        half.LOWERED[Convolution](layer, TARGETS["cortex-m55"])
    assert dataclasses.is_dataclass(layer)
