"""What onnxruntime fuses on the host computes what the file says."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnx_models import FLOAT, model_of
from test_native_operators import node

from headrace.networks.network import network_of

RNG = np.random.default_rng(8)
N = 16


def _same(model: Any, x: np.ndarray, most: float = 1e-4) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (right,) = session.run(None, {"x": x})
    with network_of(model, threads=1) as network:
        np.testing.assert_allclose(network({"x": x})["y"], right, rtol=1e-4, atol=most)


def _product(op: str, axis: int, bias_scale: float | None, **of: Any) -> Any:
    """One of quantised values, with scales of weights along an axis."""
    constants: dict[str, Any] = {
        "scale": np.float32(0.02), "zero": np.uint8(128),
        "w": RNG.integers(-127, 128, (N, N)).astype(np.int8),
        "scales": RNG.uniform(0.001, 0.01, N).astype(np.float32),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero", "d"),
        node("DequantizeLinear", "w scales", "dw", axis=axis),
    ]  # fmt: skip
    inputs = "d dw"
    if bias_scale is not None:
        constants["bias"] = RNG.integers(-500, 500, N).astype(np.int32)
        constants["unit"] = np.float32(bias_scale)
        nodes.append(node("DequantizeLinear", "bias unit", "db"))
        inputs += " db"
    nodes.append(node(op, inputs, **of))
    return model_of(nodes, {"x": (FLOAT, [3, N])}, ["y"], constants, opset=13)


@pytest.mark.parametrize(
    ("op", "axis", "of"),
    [("MatMul", 0, {}), ("MatMul", -2, {}), ("Gemm", 0, {}), ("Gemm", 1, {"transB": 1})],
)
def test_scales_along_the_rows_of_weights(op: str, axis: int, of: dict[str, Any]) -> None:
    _same(_product(op, axis, None, **of), RNG.standard_normal((3, N)).astype(np.float32))


def test_biases_with_a_scale_of_their_own() -> None:
    x = RNG.standard_normal((3, N)).astype(np.float32)
    _same(_product("Gemm", 1, 0.01), x)


def _norm(power: float, turned: bool, opset: int) -> Any:
    constants: dict[str, Any] = {
        "p": np.float32(power), "e": np.float32(1e-3), "axes": np.array([-1]),
        "w": RNG.standard_normal(N).astype(np.float32), "b": np.zeros(N, np.float32),
    }  # fmt: skip

    def mean(x: str, y: str) -> Any:
        if opset < 18:
            return node("ReduceMean", x, y, axes=[-1])
        return node("ReduceMean", f"{x} axes", y)

    nodes = [
        mean("x", "m"), node("Sub", "m x" if turned else "x m", "d"), node("Pow", "d p", "s"),
        mean("s", "v"), node("Add", "v e", "ve"), node("Sqrt", "ve", "r"), node("Div", "d r", "n"),
        node("Mul", "n w", "nw"), node("Add", "nw b"),
    ]  # fmt: skip
    return model_of(nodes, {"x": (FLOAT, [2, 3, 5, N])}, ["y"], constants, opset=opset)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("power", "turned"), [(4.0, False), (2.0, True), (2.0, False)])
def test_what_is_nearly_a_layer_norm(power: float, turned: bool, opset: int) -> None:
    _same(_norm(power, turned, opset), RNG.standard_normal((2, 3, 5, N)).astype(np.float32))


@pytest.mark.parametrize("opset", [13, 18])
def test_means_that_are_no_columns(opset: int) -> None:
    """Of [N, 1], without the dimension that they are of, they are a row."""
    model = _norm(2.0, False, opset)
    for one in model.graph.node:
        if one.op_type == "ReduceMean":
            one.attribute.append(helper.make_attribute("keepdims", 0))
    shape = model.graph.input[0].type.tensor_type.shape
    for i, size in enumerate((1, 1, N, 1)):
        shape.dim[i].dim_value = size
    _same(model, RNG.standard_normal((1, 1, N, 1)).astype(np.float32))


@pytest.mark.parametrize("op", ["LayerNormalization", "Gelu", "QuickGelu", "Reciprocal"])
def test_constants_that_add_a_dimension(op: str) -> None:
    one = np.ones((1,) * 4, np.float32)
    constants = {"p": np.float32(2), "e": one / 1000, "h": one / 2, "r": one * 1.41421356, "a": one}
    nodes = {
        "LayerNormalization": [
            node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "d"),
            node("Pow", "d p", "s"), node("ReduceMean", "s", "v", axes=[-1]),
            node("Add", "v e", "ve"), node("Sqrt", "ve", "q"), node("Div", "d q", "n"),
            node("Mul", "n w", "nw"), node("Add", "nw w", "z"),
        ],
        "Gelu": [
            node("Div", "x r", "d"), node("Erf", "d", "f"), node("Add", "f a", "g"),
            node("Mul", "x g", "k"), node("Mul", "k h", "z"),
        ],
        "QuickGelu": [node("Mul", "x r", "d"), node("Sigmoid", "d", "s"), node("Mul", "x s", "z")],
        "Reciprocal": [node("Exp", "x", "d"), node("Div", "a d", "s"), node("Mul", "x s", "z")],
    }  # fmt: skip
    constants["w"] = RNG.standard_normal(N).astype(np.float32)
    model = model_of(
        [*nodes[op], node("Sin", "z")], {"x": (FLOAT, [3, 5, N])}, ["y"], constants, 13
    )
    _same(model, RNG.standard_normal((3, 5, N)).astype(np.float32))


def test_what_onnxruntime_turns_into_something_that_it_has_not() -> None:
    """It moves transposes behind Pad and Resize, with axes and scales that they do not take."""
    constants = {"pads": np.array([0, 0, -2, 0]), "axes": np.array([3, -3]), "none": np.float32(0)}
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 3, 1]), node("Pad", "t pads none axes", "p"),
        node("Sin", "p", "s"), node("Transpose", "s", perm=[0, 3, 1, 2]),
    ]  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [1, 3, 4, 5])}, ["y"], constants, opset=19)
    _same(model, RNG.standard_normal((1, 3, 4, 5)).astype(np.float32))


@pytest.mark.parametrize(("opset", "dtype"), [(10, np.int8), (21, ml_dtypes.int4)])
def test_biases_of_floats_stay_floats(opset: int, dtype: Any) -> None:
    """Where no product of integers follows, or they cannot be rounded."""
    constants: dict[str, Any] = {
        "scale": np.float32(0.2), "zero": np.uint8(128), "unit": np.float32(0.5),
        "fine": np.float32(0.01),
        "w": RNG.integers(-7, 8, (N, N // 2, 1, 1)).astype(dtype), "none": np.zeros((), dtype),
        "bias": RNG.standard_normal(N).astype(np.float32),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero", "d"),
        node("DequantizeLinear", "w unit none", "dw"), node("Conv", "d dw bias", "c", group=2),
        node("QuantizeLinear", "c fine zero", "cq"), node("DequantizeLinear", "cq fine zero"),
    ]  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [1, N, 3, 3])}, ["y"], constants, opset=opset)
    _same(model, RNG.standard_normal((1, N, 3, 3)).astype(np.float32))


def test_sums_that_have_more_dimensions_than_the_product() -> None:
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"), node("MatMulInteger", "q w z", "i"),
        node("Cast", "i", "f", to=FLOAT), node("Mul", "s unit", "u"), node("Mul", "f u", "m"),
        node("Add", "m bias"),
    ]  # fmt: skip
    constants: dict[str, Any] = {
        "w": RNG.integers(-127, 128, (N, N)).astype(np.int8), "unit": np.float32(0.01),
        "bias": RNG.standard_normal((1, 1, N)).astype(np.float32),
    }  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [3, N])}, ["y"], constants, opset=21)
    _same(model, RNG.standard_normal((3, N)).astype(np.float32))
