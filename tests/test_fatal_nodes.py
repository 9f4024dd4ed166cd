"""Nodes over which onnxruntime would end the process are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of

from headrace.errors import HeadraceError
from headrace.networks.network import network_of

CASES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("RandomUniformLike", ["x"], {"low": 2.0, "high": 1.0}),
    ("RandomUniformLike", ["x"], {"high": float("inf")}),
    ("RandomNormalLike", ["x"], {"scale": -1.0}),
    ("GatherND", ["x", "ids"], {"batch_dims": -2}),
    ("LayerNormalization", ["x", "w"], {}),
    ("LayerNormalization", ["x", "row"], {"axis": 2**31}),
    ("Resize", ["x", "row"], {"mode": "linear"}),
    ("Resize", ["x", "w", "scales"], {}),
    ("Resize", ["x", "", "odd"], {}),
    ("RandomUniformLike", ["x"], {"low": "a"}),
    ("ReverseSequence", ["ids", "ids"], {}),
    ("DFT", ["scalar"], {}),
    ("RoiAlign", ["x", "rois", "ids"], {"sampling_ratio": -(2**63)}),
    ("Split", ["x"], {"num_outputs": 3}),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES)
def test_it_is_refused(
    op: str, inputs: list[str], attributes: dict[str, Any], turned: bool
) -> None:
    given = ["t" if turned and name == "x" else name for name in inputs]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node(op, given, ["o"], **attributes), helper.make_node("Relu", ["o"], ["y"]),
    ]  # fmt: skip
    constants = {
        "w": np.ones((4, 4, 1, 1), np.float32), "row": np.ones(5, np.float32),
        "ids": np.array([1]), "scales": np.array([1, 1, 2, 2], np.float32),
        "scalar": np.float32(1), "odd": np.array([1, 1, np.nan, 2], np.float32),
        "rois": np.zeros((1, 4), np.float32),
    }  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [1, 4, 6, 5])}, ["y"], constants, opset=18)
    with network_of(model, threads=1) as network, pytest.raises(HeadraceError, match=op):
        network({"x": np.ones((1, 4, 6, 5), np.float32)})


@pytest.mark.parametrize(
    ("op", "inputs", "match"),
    [
        ("QLinearConcat", "none zero q scale zero", "input 0, a scale or a zero point, has 0"),
        ("QLinearConcat", "scale zero q scale ", "input 4 is left out"),
        (
            "QLinearAdd",
            "q scale zero q none zero scale zero",
            "input 4, a scale .* has 0",
        ),
    ],
)
def test_scales_without_elements(op: str, inputs: str, match: str) -> None:
    attributes = {"axis": 1} if op == "QLinearConcat" else {}
    given = inputs.split(" ")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node(op, given, ["p"], domain="com.microsoft", **attributes),
        helper.make_node("DequantizeLinear", ["p", "scale", "zero"], ["y"]),
    ]
    constants = {
        "none": np.zeros(0, np.float32), "scale": np.float32(0.1), "zero": np.uint8(3),
    }  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [2, 4])}, ["y"], constants, opset=18)
    with network_of(model, threads=1) as network, pytest.raises(HeadraceError, match=match):
        network({"x": np.ones((2, 4), np.float32)})


def test_zero_points_that_may_be_left_out() -> None:
    """onnxruntime takes that of these results to be there."""
    given = ["q", "scale", "zero", "fine"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("QLinearSigmoid", given, ["p"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["p", "fine"], ["y"]),
    ]
    constants = {
        "scale": np.float32(0.1), "zero": np.uint8(128), "fine": np.float32(1 / 256),
    }  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [2, 4])}, ["y"], constants, opset=18)
    x = np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network({"x": x})["y"], 1 / (1 + np.exp(-x)), atol=0.02)


def test_strides_that_no_image_has() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], group=4, strides=[2**63 - 1, 2])
    constants = {"w": np.ones((4, 1, 3, 3), np.float32)}
    model = model_of([conv], {"x": (FLOAT, [2, 4, 6, 6])}, ["y"], constants, opset=18)
    with network_of(model, threads=1) as network:
        assert (
            network({"x": np.ones((2, 4, 6, 6), np.float32)})["y"].tolist() == [[[[9, 9]]] * 4] * 2
        )


def test_products_whose_sizes_do_not_fit() -> None:
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    constants = {"w": np.ones((8, 10), np.float32), "b": np.ones(8, np.float32)}
    model = model_of([gemm], {"x": (FLOAT, [4, 1])}, ["y"], constants, opset=11)
    with network_of(model, threads=1) as network, pytest.raises(HeadraceError, match="Gemm"):
        network({"x": np.ones((4, 1), np.float32)})
