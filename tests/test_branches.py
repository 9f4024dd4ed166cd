"""`If` nodes: which conditions are known before anything runs, and what stands in their place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx_models import FLOAT, INT64, model_of

from headrace.networks.network import network_of

BOOL = onnx.TensorProto.BOOL


def graph(name: str, nodes: list[Any], outputs: list[str], **constants: np.ndarray) -> Any:
    return helper.make_graph(
        nodes, name, [], [onnx.ValueInfoProto(name=one) for one in outputs],
        [numpy_helper.from_array(array, of) for of, array in constants.items()],
    )  # fmt: skip


def operators(network: Any, inputs: dict[str, Any]) -> list[str]:
    return [node.op for _, nodes in network.plan(inputs).where() for node in nodes]


def of_a_rate() -> Any:
    """Above 5 the sum of x and a weight of its own, else its negative; both call it `inner`."""
    w = np.arange(600, dtype=np.float32)
    then = graph("then", [helper.make_node("Add", ["x", "inner_w"], ["inner"])], ["inner"],
                 inner_w=w)  # fmt: skip
    other = graph("else", [helper.make_node("Neg", ["x"], ["inner"])], ["inner"])
    nodes = [
        helper.make_node("Greater", ["rate", "five"], ["fast"]),
        helper.make_node("If", ["fast"], ["y"], then_branch=then, else_branch=other),
        helper.make_node("If", ["fast"], ["z"], then_branch=then, else_branch=other),
    ]
    inputs = {"x": (FLOAT, [600]), "rate": (INT64, [])}
    return model_of(nodes, inputs, ["y", "z"], {"five": np.array(5)}), w


def test_a_number_decides() -> None:
    model, w = of_a_rate()
    network = network_of(model, threads=1)
    x = np.ones(600, np.float32)
    plans = set()
    for rate in (*range(0, 400, 7), 3):
        inputs = {"x": x, "rate": np.array(rate)}
        found = network(inputs)
        for name in ("y", "z"):
            np.testing.assert_array_equal(found[name], x + w if rate > 5 else -x)
        assert not {"If", "Greater"} & set(operators(network, inputs))
        plans.add(id(network.plan(inputs)))
    assert len(plans) == 2  # for what is decided, not for each number


def test_a_condition_itself_is_given() -> None:
    then = graph("then", [helper.make_node("Abs", ["x"], ["t"])], ["t"])
    other = graph("else", [], ["x"])  # a value from outside
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    network = network_of(model_of([node], {"x": (FLOAT, [3]), "c": (BOOL, [1])}, ["y", "c"]))
    x = np.array([-1, 2, -3], np.float32)
    for c in (True, False, True):
        found = network({"x": x, "c": np.array([c])})
        np.testing.assert_array_equal(found["y"], abs(x) if c else x)
        assert found["c"].tolist() == [c]


def test_shapes_decide_inside_of_branches() -> None:
    """Of a rank that is not this one, a branch may be impossible."""
    squeezed = graph("one", [helper.make_node("Squeeze", ["x", "zero"], ["r"])], ["r"])
    whole = graph("many", [helper.make_node("Identity", ["x"], ["r"])], ["r"])
    inner = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "nought"], ["rows"]),
        helper.make_node("Equal", ["rows", "one"], ["single"]),
        helper.make_node("If", ["single"], ["r"], then_branch=squeezed, else_branch=whole),
        helper.make_node("Neg", ["r"], ["inner"]),
    ]
    then = graph("then", inner, ["inner"])
    other = graph("else", [helper.make_node("Abs", ["x"], ["inner"])], ["inner"])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    constants = {"zero": np.array([0]), "nought": np.array(0), "one": np.array(1)}
    model = model_of([node], {"x": (FLOAT, ["n", 4]), "c": (BOOL, [])}, ["y"], constants)
    network = network_of(model)
    for rows in (1, 3):
        x = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
        inputs = {"x": x, "c": np.array(True)}
        np.testing.assert_array_equal(network(inputs)["y"], -(x[0] if rows == 1 else x))
        assert "If" not in operators(network, inputs)


def test_data_do_not_decide_ahead() -> None:
    """The branch that is not taken does not fit the shape: onnxruntime is not told of it."""
    squeezed = graph("one", [helper.make_node("Squeeze", ["x", "zero"], ["r"])], ["r"])
    whole = graph("many", [helper.make_node("Identity", ["x"], ["r"])], ["r"])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Less", ["most", "least"], ["low"]),
        helper.make_node("If", ["low"], ["y"], then_branch=squeezed, else_branch=whole),
    ]
    constants = {"zero": np.array([0]), "least": np.float32(-9)}
    network = network_of(model_of(nodes, {"x": (FLOAT, ["n", 4])}, ["y"], constants))
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(network({"x": x})["y"], x)
    assert "If" in operators(network, {"x": x})
    assert [on for on, _ in network.plan({"x": x}).where()] == ["onnxruntime"]
    np.testing.assert_array_equal(network({"x": -10 * x[:1]})["y"], -10 * x[0])
