"""What onnxruntime fuses on the host computes what the file says."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
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


def test_values_that_are_dequantised_without_a_zero_point() -> None:
    """And are turned then: pairs of uint8 behind that would cut off what is below 0."""
    nodes = [
        node("Gather", "x ids", "q"), node("DequantizeLinear", "q scale", "d"),
        node("Transpose", "d", perm=[1, 0]),
    ]  # fmt: skip
    constants = {"scale": np.float32(0.02), "ids": np.arange(3)[::-1].copy()}
    model = model_of(nodes, {"x": (TensorProto.INT8, [9, N])}, ["y"], constants, opset=13)
    _same(model, RNG.integers(-128, 128, (9, N)).astype(np.int8))


def test_products_of_integers_with_several_matrices() -> None:
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"), node("MatMulInteger", "q w z middle", "i"),
        node("Cast", "i", "f", to=FLOAT), node("Mul", "unit s", "u"), node("Mul", "f u", "m"),
        node("Add", "m bias"),
    ]  # fmt: skip
    constants: dict[str, Any] = {
        "w": RNG.integers(0, 256, (3, 1, 5)).astype(np.uint8), "middle": np.uint8(128),
        "bias": RNG.standard_normal(5).astype(np.float32),
        "unit": RNG.uniform(0.002, 0.02, 5).astype(np.float32),
    }  # fmt: skip
    model = model_of(nodes, {"x": (FLOAT, [3, 3, 1])}, ["y"], constants)
    _same(model, RNG.standard_normal((3, 3, 1)).astype(np.float32))


def _pairs(value: str, *after: Any, scale: Any = 0.02, zero: Any = 128, **of: Any) -> Any:
    """A model of x [2, N, 4, 3] that is quantised, and of what follows."""
    constants: dict[str, Any] = {
        "scale": np.float32(scale), "zero": np.uint8(zero),
        "fine": np.array([0.005], np.float32),
        "none": np.array([0], np.uint8), "w": RNG.integers(-127, 128, (3, 5)).astype(np.int8),
        "own": np.float32(0.01), "middle": np.int8(0),
        "bias": RNG.integers(-50, 50, 5).astype(np.int32),
        "floats": RNG.standard_normal(5).astype(np.float32),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x scale zero", "q", **of),
        node("DequantizeLinear", "q scale zero", "d", **of), *after,
    ]  # fmt: skip
    read = {name for one in nodes for name in one.input}
    constants = {name: one for name, one in constants.items() if name in read}
    return model_of(nodes, {"x": (FLOAT, [2, N, 4, 3])}, [value], constants, opset=13)


def _images() -> np.ndarray:
    return RNG.standard_normal((2, N, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "Sigmoid", "MatMul"])
def test_activations_with_several_scales(op: str) -> None:
    scales, zeros = RNG.uniform(0.01, 0.03, 3), RNG.integers(90, 160, 3)
    more = [node("DequantizeLinear", "w own", "dw")] if op == "MatMul" else []
    end = [
        node(op, "d dw" if more else "d", "p"), node("QuantizeLinear", "p fine none", "pq"),
        node("DequantizeLinear", "pq fine none"),
    ]  # fmt: skip
    model = _pairs("y", *more, *end, scale=scales, zero=zeros, axis=3)
    _same(model, _images(), most=0.0051 if op == "MatMul" else 1e-4)


@pytest.mark.parametrize(("opset", "bias"), [(13, "db"), (10, "floats")])
def test_sums_behind_products(opset: int, bias: str) -> None:
    """They become biases, which have scales of their own or are floats."""
    made = [node("DequantizeLinear", "bias own", "db")] if bias == "db" else []
    model = _pairs(
        "y", *made, node("DequantizeLinear", "w own middle", "dw"), node("MatMul", "d dw", "p"),
        node("Add", f"p {bias}", "s"), node("QuantizeLinear", "s scale zero", "sq"),
        node("DequantizeLinear", "sq scale zero"),
    )  # fmt: skip
    model.opset_import[0].version = opset
    _same(model, _images(), most=0.021)


def test_what_is_quantised_twice() -> None:
    model = _pairs(
        "y", node("QuantizeLinear", "d fine none", "e"), node("DequantizeLinear", "e fine none")
    )
    _same(model, _images())


def test_outputs_that_are_quantised_where_they_are_transposed() -> None:
    model = _pairs(
        "t", node("Tanh", "d", "t"), node("Transpose", "t", "u", perm=[0, 2, 1, 3]),
        node("QuantizeLinear", "u fine none", "uq"), node("DequantizeLinear", "uq fine none"),
    )  # fmt: skip
    model.graph.output.add(name="y")
    x = _images()
    with network_of(model, threads=1) as network:
        found = network({"x": x})["t"]
    scale = np.float32(0.02)
    codes = np.clip(np.rint(x / scale) + 128, 0, 255) - 128
    np.testing.assert_allclose(found, np.tanh(codes * scale), atol=1e-5)


def test_what_onnxruntime_refuses_with_its_own_fusions() -> None:
    """Its pool of integers takes no scale of one dimension."""
    model = _pairs(
        "y", node("QuantizeLinear", "d fine", "e"), node("DequantizeLinear", "e fine", "f"),
        node("AveragePool", "f", "p", kernel_shape=[2, 2]),
        node("QuantizeLinear", "p fine none", "pq"), node("DequantizeLinear", "pq fine none"),
    )  # fmt: skip
    _same(model, _images())


def test_products_of_what_is_transposed_and_a_vector() -> None:
    nodes = [node("Transpose", "x", "t", perm=[1, 0]), node("MatMul", "t v")]
    constants = {"v": RNG.standard_normal(5).astype(np.float32)}
    model = model_of(nodes, {"x": (FLOAT, [5, N])}, ["y"], constants)
    _same(model, RNG.standard_normal((5, N)).astype(np.float32))


def test_fused_products_with_a_vector() -> None:
    nodes = [node("FusedMatMul", "x v", "p", domain="com.microsoft"), node("Add", "p p")]
    constants = {"v": RNG.standard_normal(N).astype(np.float32)}
    model = model_of(nodes, {"x": (FLOAT, [5, N])}, ["y"], constants)
    _same(model, RNG.standard_normal((5, N)).astype(np.float32))


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint4", "int4", "float8e4m3fn"])
def test_what_is_rectified_before_it_is_quantised(kind: str) -> None:
    """Zero points that are not the least code, of types that it takes for bytes."""
    floats = getattr(ml_dtypes, "float8_e4m3fn", None) if kind == "float8e4m3fn" else None
    dtype = floats or getattr(ml_dtypes, kind, None) or np.dtype(kind)
    nodes = [
        node("Relu", "x", "r"), node("QuantizeLinear", "r scale zero", "q"),
        node("DequantizeLinear", "q scale zero"),
    ]  # fmt: skip
    zero = np.array(0 if floats or kind.startswith("int") else 1, dtype)
    constants = {"scale": np.float32(0.25), "zero": zero}
    model = model_of(nodes, {"x": (FLOAT, [4, N])}, ["y"], constants, opset=21)
    _same(model, np.linspace(-2, 2, 4 * N, dtype=np.float32).reshape(4, N), 0)
