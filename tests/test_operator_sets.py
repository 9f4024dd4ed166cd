"""Operators mean what the operator set of their file says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_encoders import encoder, tokens
from onnx_models import FLOAT, model_of
from test_native_operators import RNG, constant, expected, node

from headrace.networks.network import network_of


@pytest.mark.parametrize("opset", [7, 11])
@pytest.mark.parametrize("op", ["Squeeze", "Unsqueeze"])
def test_axes_from_the_end(op: str, opset: int) -> None:
    x = np.random.default_rng(1).standard_normal((1, 20, 7)).astype(np.float32)
    nodes = [node(op, "x", "s", axes=[-3]), node("Relu", "s")]
    model = model_of(nodes, {"x": (FLOAT, list(x.shape))}, ["y"], opset=opset)
    try:
        (right,) = expected(model, {"x": x})
    except Exception:
        assert (op, opset) == ("Unsqueeze", 7)
        return
    with network_of(model, threads=1) as network:
        np.testing.assert_array_equal(network({"x": x})["y"], right)


@pytest.mark.parametrize("axis", [1, -3])
@pytest.mark.parametrize("opset", [11, 13])
def test_the_mean_under_a_softmax(opset: int, axis: int) -> None:
    """Before operator set 13 a softmax is of all dimensions from its axis on."""
    constants: dict[str, Any] = {
        "w": constant(64, 16, 1, 1), "bins": np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1),
        "flat": np.array([1, 64, 25]), "split": np.array([1, 4, 16, 25]),
        "sides": np.array([1, 4, 25]),
    }  # fmt: skip
    nodes = [
        node("Conv", "x w", "c"), node("Reshape", "c flat", "f"), node("Reshape", "f split", "s"),
        node("Transpose", "s", "t", perm=[0, 2, 1, 3]), node("Softmax", "t", "p", axis=axis),
        node("Conv", "p bins", "m"), node("Reshape", "m sides"),
    ]  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [1, 16, 5, 5])}, ["y"], constants, opset=opset)
    _same(model, {"x": RNG.standard_normal((1, 16, 5, 5)).astype(np.float32)})


def test_attention_of_an_older_softmax() -> None:
    """That of an encoder, whose axis is left out: all heads, queries and keys then."""
    rng = np.random.default_rng(6)
    model = encoder(rng, "old", layers=1)
    model.opset_import[0].version = 12
    constants = {one.name: one for one in model.graph.initializer}
    for one in model.graph.node:
        if one.op_type == "Softmax":
            del one.attribute[:]
        if one.op_type == "Unsqueeze":  # its axes were an attribute
            constants[one.input.pop()].name = "unread"
            one.attribute.append(node("Unsqueeze", "x", axes=[1, 2]).attribute[0])
    _same(model, tokens(rng, 2, 9))


def test_masks_of_attention_before_there_is_where() -> None:
    constants = {"w": constant(16, 48), "b": constant(48), "v": constant(16, 16)}
    nodes = [
        node("MatMul", "x v", "p"), node("Relu", "p", "r"),
        node("Attention", "r w b counts", num_heads=2, domain="com.microsoft"),
    ]  # fmt: skip
    shapes = {"x": (FLOAT, [2, 4, 16]), "counts": (6, [2])}
    model = model_of(nodes, shapes, ["y"], constants, opset=8)
    x = RNG.standard_normal((2, 4, 16)).astype(np.float32)
    inputs = {"x": x, "counts": np.array([2, 4], np.int32)}
    _same(model, inputs)
    with network_of(model, threads=1) as network:
        assert "reference" not in [on for on, _ in network.plan(inputs).where()]


def _same(model: Any, inputs: dict[str, np.ndarray]) -> None:
    (right,) = expected(model, inputs)
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network(inputs)["y"], right, rtol=1e-4, atol=1e-4)
