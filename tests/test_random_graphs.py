"""Random graphs give what onnxruntime gives, on any threads, in patches and in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_graphs import random_graph
from onnx_models import FLOAT, model_of, save

from headrace.errors import BudgetError, HeadraceError
from headrace.networks import needs, specialise
from headrace.networks.network import Network, load_network, network_of

Values = dict[str, np.ndarray]
QUICK, LAST = 12, 1200


def _expected(model: Any, *inputs: Values) -> list[Values] | None:
    """Of onnxruntime as the graph stands; None: it refuses what windows take of nothing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    names = [one.name for one in model.graph.output]
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        return [dict(zip(names, session.run(names, given), strict=True)) for given in inputs]
    except Exception:
        return None


def _random_inputs(model: Any, rng: np.random.Generator) -> Values:
    shapes = {
        one.name: [d.dim_value for d in one.type.tensor_type.shape.dim] for one in model.graph.input
    }
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


def _with_other_weights(model: Any, rng: np.random.Generator) -> Any:
    """Of two and more dimensions: others are sizes, bounds and exponents, or few."""
    other = type(model)()
    other.CopyFrom(model)
    for one in other.graph.initializer:
        if one.data_type == FLOAT and len(one.dims) > 1:
            array = numpy_helper.to_array(one)
            noise = 1 + 1e-6 * rng.standard_normal(array.shape)
            one.CopyFrom(numpy_helper.from_array((array * noise).astype(np.float32), one.name))
    return other


def _agree(found: Values, expected: Values, moved: Values) -> None:
    """As near as onnxruntime's are to its own for inputs and weights that differ by 1e-6."""
    for name, array in expected.items():
        off = np.abs(moved[name] - array).max(initial=0)
        limit = 30 * off + 1e-5 * np.abs(array).max(initial=0) + 1e-6
        np.testing.assert_allclose(found[name], array, rtol=0, atol=limit)


def _least(path: Path, inputs: Values) -> int:
    budget = 1
    for _ in range(3):  # what onnxruntime takes is said first
        with load_network(path, memory=budget, patches="off") as network:
            try:
                return network.plan(inputs).memory.budget or budget
            except BudgetError as error:
                budget = error.needed_bytes or budget
    raise AssertionError(budget)


def _ways(path: Path, inputs: Values) -> list[dict[str, Any]]:
    return [
        {"threads": 2}, {"threads": 1, "patches": 2}, {"threads": 1, "patches": "auto"},
        {"threads": 2, "patches": "off", "memory": _least(path, inputs)},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "seed",
    [pytest.param(s, marks=[pytest.mark.slow] if s >= QUICK else []) for s in range(LAST)],
)
def test_random_graph(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "LEAST_BYTES", 512)
    rng = np.random.default_rng(seed)
    model = random_graph(rng)
    inputs = _random_inputs(model, rng)
    near = {
        n: (x * (1 + 1e-6 * rng.standard_normal(x.shape))).astype(np.float32)
        for n, x in inputs.items()
    }
    expected = _expected(model, inputs)
    moved = None if expected is None else _expected(_with_other_weights(model, rng), near)
    path = save(model, tmp_path / "m.onnx")
    try:
        with load_network(path, threads=1) as network:
            first = network(inputs)
            ours = all(who == "headrace" for who, _ in network.plan(inputs).where())
    except HeadraceError:
        assert expected is None
        return
    if expected is not None and moved is not None:
        _agree(first, *expected, *moved)
    for way in _ways(path, inputs):
        try:
            with load_network(path, **way) as network:
                found = network(inputs)
        except HeadraceError as error:
            assert way.get("patches") == 2 and "patches" in str(error)
            continue
        for name, array in found.items():
            if ours:  # sums of onnxruntime depend on threads
                np.testing.assert_array_equal(array, first[name])
        if expected is not None and moved is not None:
            _agree(found, *expected, *moved)


def _equals_onnxruntime(model: Any, inputs: Values) -> Network:
    (expected,) = _expected(model, inputs) or []
    network = network_of(model, threads=1)
    found = network(inputs)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
    return network


def test_channels_are_cut_and_rows_turned() -> None:
    of = {"starts": [-1, 4], "ends": [-(2**62), 12], "axes": [0, 1], "steps": [-1, 1]}
    constants = {name: np.array(value, np.int64) for name, value in of.items()}
    nodes = [helper.make_node("Slice", ["x", *of], ["y"])]
    model = model_of(nodes, {"x": (FLOAT, [5, 22])}, ["y"], constants)
    x = np.random.default_rng(1).standard_normal((5, 22)).astype(np.float32)
    _equals_onnxruntime(model, {"x": x}).close()


@pytest.mark.parametrize("opset", [11, 21])
def test_windows_that_begin_behind_the_image_are_none(opset: int) -> None:
    """Before operator set 22, onnx says that there are more of them."""
    sizes: dict[str, Any] = {
        "ceil_mode": 1, "kernel_shape": [3, 2], "pads": [0, 1, 1, 1], "strides": [3, 3],
    }  # fmt: skip
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], **sizes, dilations=[1, 2]),
        helper.make_node("Relu", ["p"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"]),
    ]
    w = np.random.default_rng(1).standard_normal((8, 20, 1, 1)).astype(np.float32)
    model = model_of(nodes, {"x": (FLOAT, [2, 20, 16, 14])}, ["y"], {"w": w}, opset=opset)
    x = np.random.default_rng(2).standard_normal((2, 20, 16, 14)).astype(np.float32)
    with _equals_onnxruntime(model, {"x": x}) as network:
        assert network({"x": x})["y"].shape == (2, 8, 6, 5)


def test_values_of_another_size_than_was_inferred_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel would read behind what onnxruntime has made."""
    monkeypatch.setattr(specialise, "_SINCE", {})
    sizes: dict[str, Any] = {"ceil_mode": 1, "kernel_shape": [2, 2], "strides": [3, 3]}
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], **sizes, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["p", "w"], ["y"]),
    ]
    w = np.ones((8, 4, 1, 1), np.float32)
    model = model_of(nodes, {"x": (FLOAT, [1, 4, 14, 14])}, ["y"], {"w": w})
    with (
        network_of(model) as network,
        pytest.raises(HeadraceError, match=r"p has the shape \[1, 4, 5, 5\].*\[1, 4, 6, 6\]"),
    ):
        network({"x": np.zeros((1, 4, 14, 14), np.float32)})


def test_steps_that_leave_the_ends_out() -> None:
    """Of SAME_UPPER with wide steps, onnxruntime takes the window in the middle."""
    w = np.random.default_rng(1).standard_normal((16, 16, 3, 2)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[1, 16])
    model = model_of([node], {"x": (FLOAT, [1, 16, 5, 5])}, ["y"], {"w": w})
    x = np.random.default_rng(2).standard_normal((1, 16, 5, 5)).astype(np.float32)
    _equals_onnxruntime(model, {"x": x}).close()


def test_windows_without_a_pixel() -> None:
    sizes: dict[str, Any] = {"kernel_shape": [1, 2], "dilations": [1, 2], "pads": [0, 1, 0, 1]}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["y"], **sizes),
    ]
    model = model_of(nodes, {"x": (FLOAT, [1, 16, 4, 1])}, ["y"])
    x = np.random.default_rng(1).standard_normal((1, 16, 4, 1)).astype(np.float32)
    _equals_onnxruntime(model, {"x": x}).close()


HUGE = 2**31 - 1


@pytest.mark.parametrize("size", [HUGE, 2**40])
def test_sizes_that_no_memory_has_are_refused_before_it_is_taken(size: int, tmp_path: Path) -> None:
    pads = np.array([size, 0, 0, 0, 0, 0])
    for mode in ("edge", "constant"):
        node = helper.make_node("Pad", ["x", "pads"], ["p"], mode=mode)
        nodes = [node, helper.make_node("Relu", ["p"], ["y"])]
        model = model_of(nodes, {"x": (FLOAT, [1, 64, 64])}, ["y"], {"pads": pads})
        path = save(model, tmp_path / "m.onnx")
        with load_network(path) as network, pytest.raises(HeadraceError):
            network({"x": np.zeros((1, 64, 64), np.float32)})


@pytest.mark.parametrize(("op", "gates"), [("GRU", 3), ("LSTM", 4)])
def test_recurrent_layers_of_nothing(op: str, gates: int) -> None:
    """onnxruntime ends the process."""
    w = {
        "w": np.zeros((1, 16 * gates, 8), np.float32),
        "r": np.zeros((1, 16 * gates, 16), np.float32),
    }
    nodes = [helper.make_node(op, ["x", "w", "r"], ["y"], hidden_size=16)]
    model = model_of(nodes, {"x": (FLOAT, [3, "batch", 8])}, ["y"], w)
    with network_of(model) as network:
        found = network({"x": np.zeros((3, 0, 8), np.float32)})["y"]
    assert found.shape == (3, 1, 0, 16)


def _attributes(**changed: Any) -> Any:
    given = {"K": 64, "N": 16, "bits": 4, "block_size": 32} | changed
    given = {name: value for name, value in given.items() if value is not None}
    return helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **given)


# What the changes of files found that are run with random damage.
MALFORMED: dict[str, Any] = {
    "a missing attribute": _attributes(block_size=None),
    "a missing width": _attributes(N=None),
    "codes that are scales": helper.make_node(
        "MatMulNBits", ["x", "s", "s"], ["y"], domain="com.microsoft", K=64, N=16, block_size=32
    ),
    "codes left out": helper.make_node(
        "MatMulNBits", ["x", "", "s"], ["y"], domain="com.microsoft", K=64, N=16, block_size=32
    ),
    "axes of another type": helper.make_node("ReduceMean", ["x"], ["y"], axes=[1.5]),
    "no axis": helper.make_node("Split", ["x"], ["y", "z"], axis="x"),
    "weights without dimensions": helper.make_node("Conv", ["x", "none"], ["y"]),
    "more states than there are numbers": helper.make_node(
        "GRU", ["x", "none", "none"], ["y"], hidden_size=2**62
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_nodes_are_said(name: str) -> None:
    constants = {
        "w": np.zeros((16, 2, 16), np.uint8), "s": np.zeros(32, np.float32), "none": np.float32(0),
    }  # fmt: skip
    nodes = [MALFORMED[name], helper.make_node("Relu", ["y"], ["r"])]
    model = model_of(nodes, {"x": (FLOAT, [2, 64])}, ["r"], constants)
    with pytest.raises(HeadraceError), network_of(model) as network:
        network({"x": np.zeros((2, 64), np.float32)})
