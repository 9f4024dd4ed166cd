"""Multiply-adds of a file's operators, and the share of them that runs on our kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of, random_network

from headrace.networks.graph import TensorType
from headrace.networks.measure import describe
from headrace.networks.native import NativeRegion
from headrace.networks.network import network_of


@pytest.mark.parametrize(
    ("op", "shapes", "given", "wanted"),
    [
        ("Conv", [(2, 6, 9, 7), (8, 3, 3, 3)], {"group": 2}, 2 * 8 * 7 * 5 * 27),
        ("ConvTranspose", [(1, 4, 5, 6), (4, 3, 2, 2)], {"strides": [2, 2]}, 4 * 30 * 3 * 4),
        ("Gemm", [(5, 3), (5, 7)], {"transA": 1}, 3 * 7 * 5),
        ("MatMul", [(2, 4, 5), (5, 6)], {}, 2 * 4 * 5 * 6),
        ("MatMul", [(5,), (5, 6)], {}, 30),
        ("GRU", [(3, 2, 4), (1, 15, 4), (1, 15, 5)], {"hidden_size": 5}, 3 * 2 * 15 * 9),
        ("Add", [(3, 4), (3, 4)], {}, 0),
    ],
)
def test_multiply_adds_of_an_operator(
    op: str, shapes: list[Any], given: dict[str, Any], wanted: int
) -> None:
    names = ["x", "w", "r"][: len(shapes)]
    node = helper.make_node(op, names, ["y"], **given)
    constants = {
        name: np.ones(shape, np.float32)
        for name, shape in zip(names[1:], shapes[1:], strict=True)
    }  # fmt: skip
    model = model_of([node], {"x": (FLOAT, shapes[0])}, ["y"], constants)
    with network_of(model) as network:
        found = describe(network, {"x": TensorType(FLOAT, shapes[0])})
    assert found["macs"] == wanted and found["nodes_of_unknown_macs"] == 0


def test_they_are_those_that_our_kernels_count() -> None:
    model = random_network(np.random.default_rng(4))
    with network_of(model) as network:
        types = {
            port.name: TensorType(FLOAT, tuple(d if isinstance(d, int) else 1 for d in port.shape))
            for port in network.inputs
            if port.shape is not None
        }
        found, plan = describe(network, types), network.plan(types)
        counted = sum(
            one.macs for run in plan.runs if isinstance(run, NativeRegion) for one in run.operations
        )
    ours = sum(row["macs"] for row in found["regions"] if row["runs_on"] == "headrace")
    assert ours == counted > 0


def test_shares_of_both_sides_and_of_loops() -> None:
    x, count = helper.make_tensor_value_info("h", FLOAT, None), helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["g"]), helper.make_node("Identity", ["c"], ["d"])],
        "body", [count("i", 7, []), count("c", 9, []), x],
        [count("d", 9, []), count("g", FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Loop", ["n", "", "b"], ["y"], body=body),
    ]
    constants = {"w": np.ones((4, 4), np.float32), "n": np.array(3)}
    with network_of(model_of(nodes, {"x": (FLOAT, [2, 4])}, ["y"], constants)) as network:
        found = describe(network, {"x": TensorType(FLOAT, (2, 4))})
    assert found["macs"] == 32 and found["nodes_of_unknown_macs"] == 1
    assert found["macs_on_headrace_percent"] == 100
    assert found["nodes_on_headrace_percent"] == pytest.approx(200 / 3)
