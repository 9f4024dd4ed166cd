"""Classifiers that people quantise, on microcontrollers beside onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_classifiers import CLASSIFIERS, WAYS, Classifier, exact, quantised, samples_of
from onnx_models import FLOAT, save

from headrace.errors import UnsupportedError
from headrace.micro import half
from headrace.micro.arithmetic import computed, kinds_of, numbers_of
from headrace.micro.half import machine
from headrace.micro.kernels.numbers import Kind
from headrace.micro.learning import Learning, last_layers
from headrace.micro.network import (
    Activation,
    Concatenation,
    MicroNetwork,
    Padding,
    Softmax,
    Value,
    View,
)
from headrace.micro.plan import plan_network
from headrace.micro.ports import from_chip, to_chip
from headrace.micro.reading import read_network
from headrace.micro.training import training_step
from headrace.targets.target import microcontrollers

CHIP = microcontrollers()["cortex-m55"]


def outputs(network: MicroNetwork, x: np.ndarray) -> np.ndarray:
    """Its output as the file has it."""
    return from_chip(network, computed(network, CHIP, to_chip(network, {"x": x})))["y"]


def scale_of(path: Path, network: MicroNetwork) -> float:
    """A code of the output, or of what a function reads to make it."""
    constants = {one.name: one for one in onnx.load(path).graph.initializer}
    if "y_scale" in constants:
        return float(numpy_helper.to_array(constants["y_scale"]))
    codes = [value.codes for value in network.values() if value.codes is not None]
    return codes[-1].scale


@pytest.mark.parametrize("way", [way for way in WAYS if way != "unsigned weights"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_what_onnxruntime_does(name: str, way: str, tmp_path: Path) -> None:
    path = quantised(name, way, tmp_path)
    network = read_network(path)
    assert plan_network(network, CHIP).arena_bytes > 0
    assert network.is_quantised == (way != "floats")
    if way != "floats":
        assert kinds_of(network)[0] in ("int8", "float32") and "int8" in kinds_of(network)
    given = samples_of(CLASSIFIERS[name](), 6, 7)
    expected = np.concatenate([exact(path, x).reshape(-1) for x in given])
    found = np.concatenate([outputs(network, x).reshape(-1) for x in given])
    assert np.ptp(expected) > 0.01
    if way == "floats":  # halves
        assert np.abs(found - expected).max() < 0.01 * max(1, np.abs(expected).max())
        return
    # One code that is rounded the other way may be another one of the next layer.
    off = np.abs(found - expected) / scale_of(path, network)
    assert off.max() <= 2.01 and (off <= 1.01).mean() >= 0.9


@pytest.mark.parametrize("name", ["plain", "rows"])
def test_weights_around_another_code_than_0_are_refused(name: str, tmp_path: Path) -> None:
    path = quantised(name, "unsigned weights", tmp_path)
    with pytest.raises(UnsupportedError, match=r"no codes of 8 bits around 0.*QuantType\.QInt8"):
        read_network(path)


def camera() -> Any:
    """Bytes as they come, whose mean and scale are taken away first."""
    of = Classifier().then("Cast", to=FLOAT).then("Div", "scale").then("Sub", "mean").conv(8, 3)
    of.constants |= {"scale": np.float32(255), "mean": np.float32([[[0.5]], [[0.4]], [[0.3]]])}
    of.then("GlobalMaxPool").then("Flatten").then("Relu").linear(5, 8)
    model = of.model()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return model


def pixels() -> Any:
    """A class for each pixel."""
    return Classifier().conv(8, 3).then("Softmax", axis=1).model()


def in_both() -> Any:
    """An input that one way reads in codes, behind a view and a pool, and another as it is."""
    of = Classifier(1, 360)
    codes = (of.constant(np.float32(0.02)), of.constant(np.int8(3)))
    of.then("Reshape", of.constant(np.array([1, 1, 12, 30])))
    of.then("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).then("QuantizeLinear", *codes)
    quantised = of.then("DequantizeLinear", *codes).then("Flatten").last
    number = of.of("Tanh", "x").last
    return of.of("Concat", quantised, number, axis=1).linear(4, 450).model()


@pytest.mark.parametrize("build", [camera, pixels, in_both])
def test_other_inputs_and_outputs(build: Any, tmp_path: Path) -> None:
    path = save(build(), tmp_path / "x.onnx")
    network = read_network(path)
    plan_network(network, CHIP)
    (port,) = network.inputs
    x = np.random.default_rng(2).integers(0, 256, port.shape).astype(port.type)
    if port.is_real:
        x = (x / 255).astype(np.float32)
    np.testing.assert_allclose(outputs(network, x), exact(path, x), atol=2e-3)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("Div", ["x", "c"])], "it divides by 0"),
        ([("Sub", ["c", "x"])], "a value, then a constant"),
        ([("Mul", ["x", "rows"])], "one number, or one for each channel"),
        ([("Pad", ["x", "reflected"])], "zeros around rows and columns"),
        ([("Concat", ["x"])], "it joins batches"),
        ([("Cast", ["x"])], "bytes, or numbers, as FLOAT"),
    ],
)
def test_what_stays_refused(nodes: Any, words: str, tmp_path: Path) -> None:
    attributes = {"Concat": {"axis": 0}, "Pad": {"mode": "reflect"}, "Cast": {"to": 10}}
    of = Classifier()
    of.constants |= {
        "c": np.float32(0), "rows": np.ones((12, 1), np.float32),
        "reflected": np.array([0, 0, 1, 1] * 2),
    }  # fmt: skip
    for op, inputs in nodes:
        of.of(op, *inputs, **attributes.get(op, {}))
    with pytest.raises(UnsupportedError, match=rf"x\.onnx: .*{words}"):
        read_network(save(of.model(), tmp_path / "x.onnx"))


@pytest.mark.parametrize("kind", ["half", "single"])
@pytest.mark.parametrize("name", ["joined", "gated"])
def test_what_has_no_gradient_may_lie_in_front(name: str, kind: Kind, tmp_path: Path) -> None:
    """The forward half of a training step gives what the network does."""
    network = read_network(quantised(name, "floats", tmp_path))
    layers = network.layers
    if isinstance(layers[-1], Activation):  # a sigmoid, whose gradient there is not
        layers = layers[:-1]
    softmax = Value("probabilities", layers[-1].makes.shape, None)
    layers = (*layers, Softmax("softmax", (layers[-1].makes,), softmax))
    port = replace(network.outputs[0], value=softmax)
    network = replace(network, layers=layers, outputs=(port,))
    step = training_step(network, CHIP, Learning(last_layers(network, 1), 0.1), kind=kind)
    memory = {one: np.zeros(n + 16, np.uint8) for one, n in step.values.items()}
    for arrays in (step.constants, step.state):
        for one, array in arrays.items():
            memory[one] = np.frombuffer(array.tobytes() + bytes(64), np.uint8).copy()
    x = to_chip(network, {"x": samples_of(CLASSIFIERS[name](), 1, 5)[0]})[step.given[0]]
    x = x.astype(step.dtype)
    memory[step.given[0]][: x.nbytes] = np.frombuffer(x.tobytes(), np.uint8)
    machine.run(step.steps, CHIP, memory)
    found = memory[step.made].view(step.dtype)[: softmax.elements]
    values = {step.given[0]: x}
    for layer in network.layers:
        given = [values[value.name] for value in layer.reads]
        if isinstance(layer, View):
            values[layer.makes.name] = given[0].reshape(layer.makes.shape)
        elif isinstance(layer, Concatenation | Padding):
            values[layer.makes.name] = numbers_of(layer).computed[type(layer)](layer, CHIP, *given)
        else:
            made = half.COMPUTED[type(layer)](layer, CHIP, *given, kind=kind)
            values[layer.makes.name] = made
    assert found.tobytes() == values["probabilities"].tobytes()
    if name == "joined":
        with pytest.raises(UnsupportedError, match=r"no gradient of .*; train only layers behind"):
            training_step(network, CHIP, Learning(last_layers(network, 4), 0.1), kind=kind)
