"""Random networks for microcontrollers: what numpy says they compute, beside onnxruntime."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx_models import save
from random_micro_networks import Pick, all_values, quantised, random_network

from headrace.micro.arithmetic import computed, numbers_of
from headrace.micro.network import MicroNetwork, Value, View
from headrace.micro.ports import from_chip, to_chip
from headrace.micro.reading import read_network
from headrace.targets.target import microcontrollers

CHIP = microcontrollers()["cortex-m55"]


def read(model: Any) -> MicroNetwork:
    with tempfile.TemporaryDirectory() as folder:
        return read_network(save(model, Path(folder, "x.onnx")))


def drawn(data: st.DataObject) -> tuple[Pick, int]:
    return (
        lambda options: data.draw(st.sampled_from(list(options))),
        data.draw(st.integers(0, 1 << 16)),
    )


RANDOM = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to make a failure smaller takes too long
)


@RANDOM
@given(data=st.data())
def test_numbers_beside_onnxruntime(data: st.DataObject) -> None:
    """Layers in float32."""
    pick, seed = drawn(data)
    model, x = random_network(pick, seed)
    beside_numbers(model, x)


def beside_numbers(model: Any, x: np.ndarray) -> None:
    network, exact = read(model), all_values(model, x)
    wide = replace(
        network,
        layers=tuple(
            replace(one, reads=tuple(map(_wide, one.reads)), makes=_wide(one.makes))
            for one in network.layers
        ),
    )
    (port,) = network.inputs
    given = {port.value.name: x[0].transpose(1, 2, 0).reshape(port.value.shape)}
    found = from_chip(network, computed(wide, CHIP, given))
    # Values of all layers have sizes near one: roundings of float32 add up to less than this.
    most = max(1.0, *(float(np.abs(one).max()) for one in exact.values()))
    for output in model.graph.output:
        made, expected = found[output.name], exact[output.name]
        assert made.shape == expected.shape
        np.testing.assert_allclose(made, expected, atol=2e-5 * most)


def _wide(value: Value) -> Value:
    return replace(value, wide=True)


@RANDOM
@given(data=st.data())
def test_codes_beside_onnxruntime(data: st.DataObject) -> None:
    """Each layer of codes by itself, as roundings to other codes would go on to what follows."""
    pick, seed = drawn(data)
    model, x = random_network(pick, seed, norms=False)
    beside_codes(quantised(model, x, pick), x)


def beside_codes(model: Any, x: np.ndarray) -> None:
    network, exact = read(model), all_values(model, x)
    (port,) = network.inputs
    values = {port.value.name: to_chip(network, {port.name: x})[port.value.name]}
    for value in network.values():
        array = exact.get(value.name)
        if array is not None and value.codes is not None and array.dtype == np.float32:
            whole = np.rint(array / np.float32(value.codes.scale)) + value.codes.zero
            array = whole.clip(-128, 127).astype(np.int8)  # of what only moves codes
        if array is not None:
            signed = (array ^ np.uint8(128)).view(np.int8) if array.dtype == np.uint8 else array
            moved = signed[0].transpose(1, 2, 0) if signed.ndim == 4 else signed[0]
            values[value.name] = np.ascontiguousarray(moved).reshape(value.shape)
    for layer in network.layers:
        reads, name = [values[value.name] for value in layer.reads], layer.makes.name
        if isinstance(layer, View):
            values.setdefault(name, reads[0].reshape(layer.makes.shape))
            continue
        made = numbers_of(layer).computed[type(layer)](layer, CHIP, *reads)
        expected = values.setdefault(name, made)
        assert made.dtype == expected.dtype and made.shape == expected.shape
        off = np.abs(made.astype(np.float64) - expected)
        most = 1 if made.dtype == np.int8 else 2e-5 * max(1.0, float(np.abs(expected).max()))
        assert off.max() <= most, (layer.name, type(layer), off.max())
