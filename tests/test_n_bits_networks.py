"""MatMulNBits against numpy and onnxruntime: groups, zero points, tails, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_models import FLOAT, model_of

from headrace.networks.network import Network, network_of

INPUTS, OUTPUTS = 256, 90


def product(
    group: int, *, zeros: bool = False, bias: bool = False, level: int = 0, **more: Any
) -> tuple[Any, np.ndarray, np.ndarray]:
    """A model of one node, its weights as float64 [inputs, outputs], and its bias."""
    random = np.random.default_rng(group)
    n_groups, bits = INPUTS // group, more.pop("bits", 4)
    each = 8 // bits  # codes in a byte
    codes = random.integers(0, 1 << bits, (OUTPUTS, n_groups, group))
    offsets = random.integers(0, 1 << bits, (OUTPUTS, -(-n_groups // each) * each))
    scales = random.uniform(0.01, 0.1, (OUTPUTS, n_groups)).astype(np.float32)
    places = bits * np.arange(each)
    packed, zero_points = (
        (of.reshape(*of.shape[:-1], -1, each) << places).sum(-1).astype(np.uint8)
        for of in (codes, offsets)
    )
    constants = {
        "w": packed,
        "s": scales.reshape(-1),
        "z": zero_points.reshape(-1),
        "b": random.normal(size=OUTPUTS).astype(np.float32),
        "order": np.zeros(INPUTS, np.int32),
    }
    inputs = ["x", "w", "s", "z" if zeros else "", "order" if more.pop("order", 0) else "",
              "b" if bias else ""]  # fmt: skip
    used = {name: array for name, array in constants.items() if name in inputs}
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=INPUTS, N=OUTPUTS, bits=bits,
        block_size=group, accuracy_level=level, **more,
    )  # fmt: skip
    model = model_of([node], {"x": (FLOAT, ["rows", INPUTS])}, ["y"], used)
    zero = offsets[:, :n_groups, None] if zeros else 1 << (bits - 1)
    w = (codes - zero) * scales.astype(np.float64)[..., None]
    return model, w.reshape(OUTPUTS, INPUTS).T, constants["b"] if bias else np.zeros(OUTPUTS, "f4")


def rows(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, INPUTS)).astype(np.float32)


def where(network: Network, x: np.ndarray) -> list[str]:
    return [on for on, _ in network.plan({"x": x}).where()]


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("level", [0, 4])
def test_a_product(group: int, level: int) -> None:
    zeros, bias = group != 32, group != 64
    model, w, b = product(group, zeros=zeros, bias=bias, level=level)
    found = {}
    for threads in (1, 2):
        with network_of(model, threads=threads) as network:
            for n in (1, 3, 21):
                x = rows(n)
                y = network({"x": x})["y"]
                assert where(network, x) == ["headrace"]
                assert np.array_equal(found.setdefault(n, y), y), "threads change results"
                # Half a unit of each product and sum; codes of activations are off by half a step.
                size = np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(b)
                off = size * (INPUTS + 4) * 2.0**-24
                if level == 4 and group >= 32:
                    steps = np.abs(x).reshape(n, -1, 32).max(-1).repeat(32, 1) / 254
                    off = off * 8 + steps @ np.abs(w)
                assert (np.abs(y - (x.astype(np.float64) @ w + b)) <= off).all()


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("level", [0, 4])
def test_other_numbers_of_bits(bits: int, zeros: bool, level: int) -> None:
    """Both halves of 8 bits are products of their own: each has values up to 16 times 15."""
    for group in (32, 256):
        model, w, b = product(group, zeros=zeros, bias=True, level=level, bits=bits)
        (scales,) = [one for one in model.graph.initializer if one.name == "s"]
        scale = float(numpy_helper.to_array(scales).max())
        given = onnxruntime.InferenceSession(model.SerializeToString())
        for n in (1, 21):
            x, results = rows(n), []
            for threads in (1, 2):
                with network_of(model, threads=threads) as network:
                    results.append(network({"x": x})["y"])
                    assert where(network, x) == ["headrace"]
            y = results[0]
            assert np.array_equal(y, results[1]), "threads change results"
            size = np.abs(x).astype(np.float64).sum(1, keepdims=True) * 16 * 16 * scale + np.abs(b)
            off = size * (INPUTS + 4) * 2.0**-24
            if level == 4:
                steps = np.abs(x).reshape(n, -1, 32).max(-1).repeat(32, 1) / 254
                off = off * 8 + steps @ np.abs(w)
            assert (np.abs(y - (x.astype(np.float64) @ w + b)) <= off).all()
            if level == 0:
                (reference,) = given.run(None, {"x": x})
                assert (np.abs(y - reference) <= 2 * off).all()


def test_levels_below_4_lose_nothing() -> None:
    """A value of half a step of the codes that stand beside it."""
    for level, lost in ((0, False), (1, False), (4, True)):
        network = network_of(product(32, level=level)[0])
        large, both = np.zeros((2, 1, INPUTS), np.float32)
        large[:, 0] = both[:, 0] = 1000
        both[:, 1] = 3.9
        assert np.array_equal(network({"x": large})["y"], network({"x": both})["y"]) is lost


def test_batches() -> None:
    model, w, _ = product(64)
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=INPUTS)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    x = rows(10).reshape(2, 5, INPUTS)
    network = network_of(model)
    assert where(network, x) == ["headrace"]
    np.testing.assert_allclose(network({"x": x})["y"], x @ w, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("more", [{"order": 1}, {"level": 0, "change": "w"}])
def test_what_the_host_does(more: dict[str, Any]) -> None:
    """A group index, and weights that are no constants."""
    change = more.pop("change", None)
    model, w, _ = product(32, **more)
    inputs = {"x": rows(2)}
    if change:
        (weights,) = [one for one in model.graph.initializer if one.name == change]
        inputs[change] = np.frombuffer(weights.raw_data, np.uint8).reshape(tuple(weights.dims))
        model.graph.initializer.remove(weights)
        model.graph.input.append(helper.make_tensor_value_info(change, 2, list(weights.dims)))
    network = network_of(model)
    on = [on for on, _ in network.plan(inputs).where()]
    assert on == ["onnxruntime"]
    if change:
        np.testing.assert_allclose(network(inputs)["y"], inputs["x"] @ w, rtol=1e-3, atol=1e-2)


def test_weights_stay_packed() -> None:
    model, _, _ = product(32)
    network = network_of(model)
    (region,) = network.plan({"x": rows(1)}).runs
    assert region.weight_bytes < 96 * INPUTS  # of 96 x 256 floats a quarter
