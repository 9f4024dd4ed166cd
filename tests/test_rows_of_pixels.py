"""Convolutions of one dimension, whose values lie as images of one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_models import FLOAT, model_of
from test_native_networks import native, reference

from headrace.networks.native import NativeRegion
from headrace.networks.network import network_of

RNG = np.random.default_rng(9)


def conv(x: str, y: str, read: int, written: int, taps: int, groups: int = 1, **more: Any) -> Any:
    """A node, its weights and its bias."""
    w = RNG.standard_normal((written, read // groups, taps)).astype(np.float32) / 4
    b = RNG.standard_normal(written).astype(np.float32)
    node = helper.make_node("Conv", [x, f"w{y}", f"b{y}"], [y], group=groups, **more)
    return node, {f"w{y}": w, f"b{y}": b}


def check(model: Any, x: dict[str, np.ndarray], host: set[str]) -> None:
    """Equal to onnxruntime, with these operators alone left to it."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = dict(zip([o.name for o in session.get_outputs()], session.run(None, x), strict=True))
    found = []
    for threads in (1, 2):
        with network_of(model, threads=threads) as network:
            found.append({name: np.array(a) for name, a in network(x).items()})
            plan = network.plan(x)
            left = {n.op for on, nodes in plan.where() for n in nodes if on != "headrace"}
            assert left <= host, left
            assert any(isinstance(run, NativeRegion) for run in plan.runs)
    for name, value in expected.items():
        np.testing.assert_allclose(found[0][name], value, atol=2e-4, rtol=1e-4)
        np.testing.assert_array_equal(found[0][name], found[1][name])


@pytest.mark.parametrize(
    ("taps", "more"),
    [
        (1, {}),
        (3, {"pads": [1, 1]}),
        (5, {"pads": [4, 0], "dilations": [2]}),
        (4, {"strides": [3], "pads": [2, 1]}),
        (3, {"auto_pad": "SAME_LOWER", "strides": [2]}),
        (3, {"groups": 24, "pads": [1, 1]}),
        (3, {"groups": 3, "pads": [0, 2]}),
    ],
)
def test_one_convolution(taps: int, more: dict[str, Any]) -> None:
    node, weights = conv("x", "y", 24, 24 if "groups" in more else 40, taps, **more)
    model = model_of([node], {"x": (FLOAT, ["batch", 24, "length"])}, ["y"], weights)
    for shape in ((1, 24, 70), (3, 24, 33)):
        check(model, {"x": RNG.standard_normal(shape).astype(np.float32)}, set())


def test_a_chain_and_rows_behind_it() -> None:
    """As encoders of sound begin: convolutions, GELU, and what takes rows of channels."""
    first, weights = conv("x", "a", 20, 48, 3, pads=[1, 1])
    second, more = conv("g", "b", 48, 32, 3, pads=[1, 1], strides=[2])
    third, last = conv("g2", "c", 32, 32, 1)
    w = RNG.standard_normal((32, 64)).astype(np.float32)
    weights |= more | last | {"w": w, "half": np.float32(0.5)}
    nodes = [
        first, helper.make_node("Relu", ["a"], ["g"]), second,
        helper.make_node("Sigmoid", ["b"], ["s"]), helper.make_node("Mul", ["b", "s"], ["g2"]),
        third, helper.make_node("Add", ["c", "g2"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [2, 20, 40])}, ["y", "sum"], weights)
    check(model, {"x": RNG.standard_normal((2, 20, 40)).astype(np.float32)}, set())


def test_rows_that_become_pixels() -> None:
    node, weights = conv("turned", "y", 32, 48, 3, pads=[1, 1])
    weights["w"] = RNG.standard_normal((20, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["turned"], perm=[0, 2, 1]),
        node,
    ]
    model = model_of(nodes, {"x": (FLOAT, [2, 9, 20])}, ["y"], weights)
    check(model, {"x": RNG.standard_normal((2, 9, 20)).astype(np.float32)}, set())


def test_what_takes_rows_keeps_them() -> None:
    """A value that a convolution and a product read lies as rows; the host has the convolution."""
    node, weights = conv("x", "y", 24, 32, 1)
    weights["w"] = RNG.standard_normal((40, 64)).astype(np.float32)
    weights["v"] = RNG.standard_normal((64, 64)).astype(np.float32)
    nodes = [
        node,
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["z"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [2, 24, 40])}, ["y", "z"], weights)
    check(model, {"x": RNG.standard_normal((2, 24, 40)).astype(np.float32)}, {"Conv"})


def test_weights_of_images_are_no_others() -> None:
    tensor = numpy_helper.from_array(np.ones((16, 16, 3), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = model_of(nodes, {"x": (FLOAT, [1, 16, 16])}, ["y"])
    model.graph.initializer.append(tensor)
    check(model, {"x": RNG.standard_normal((1, 16, 16)).astype(np.float32)}, set())


@pytest.mark.parametrize("keeps", [0, 1])
def test_the_mean_of_rows_of_pixels(keeps: int) -> None:
    """As temporal convolutional networks end: of all steps of each channel."""
    rng = np.random.default_rng(7)
    w = {name: rng.standard_normal((20, 20, 3)).astype(np.float32) / 8 for name in ("w", "v")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[2, 0]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"], pads=[2, 0]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("ReduceMean", ["d"], ["y"], axes=[-1], keepdims=keeps),
    ]
    model = model_of(nodes, {"x": (FLOAT, [3, 20, 20])}, ["y"], w, opset=17)
    x = {"x": rng.standard_normal((3, 20, 20)).astype(np.float32)}
    with network_of(model, threads=2) as network:
        kernels = [one.kernel for region in native(network, x) for one in region.operations]
        assert ("images_mean" in kernels) == (not keeps)
        found, expected = network(x)["y"], reference(model, x)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
