"""Quantised networks on kernels of ours, against ONNX's reference and onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_models import FLOAT, model_of

from headrace.networks.native import NativeRegion
from headrace.networks.network import Network, network_of

UINT8, INT8 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8


class Qdq:
    """A model with QuantizeLinear and DequantizeLinear, made node by node."""

    def __init__(self, rng: np.random.Generator, dtype: Any = np.uint8) -> None:
        self.rng = rng
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def pair(self, name: str, scale: float, zero: int, end: str = "") -> str:
        """Quantise a value, and dequantise it again."""
        self.constants[f"{name}_s"] = np.array(scale, np.float32)
        self.constants[f"{name}_z"] = np.array(zero, self.dtype)
        given = [f"{name}_s", f"{name}_z"]
        end = end or f"{name}_d"
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *given], [f"{name}_q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *given], [end]))
        return end

    def weights(self, name: str, shape: tuple[int, ...], axis: int = 0) -> str:
        """int8 weights with a scale for each channel."""
        codes = self.rng.integers(-127, 128, shape).astype(np.int8)
        scale = self.rng.uniform(0.5, 1.5, shape[axis]) / (73 * np.prod(shape) ** 0.5)
        self.constants |= {
            f"{name}_q": codes,
            f"{name}_s": (scale * shape[axis] ** 0.5).astype(np.float32),
            f"{name}_z": np.zeros(shape[axis], np.int8),
        }
        inputs = [f"{name}_q", f"{name}_s", f"{name}_z"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_d"], axis=axis))
        return f"{name}_d"

    def bias(self, name: str, x: str, w: str, channels: int) -> str:
        """int32 in units of the products."""
        unit = self.constants[f"{x}_s"] * self.constants[f"{w}_s"]
        self.constants |= {
            f"{name}_q": self.rng.integers(-2000, 2000, channels).astype(np.int32),
            f"{name}_s": unit,
            f"{name}_z": np.zeros(channels, np.int32),
        }
        inputs = [f"{name}_q", f"{name}_s", f"{name}_z"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_d"], axis=0))
        return f"{name}_d"

    def conv(self, x: str, y: str, shape: tuple[int, ...], **given: Any) -> str:
        """A convolution of a dequantised value `x`_d; it makes `y`."""
        w = self.weights(f"{y}_w", shape)
        inputs = [f"{x}_d", w, self.bias(f"{y}_b", x, f"{y}_w", shape[0])]
        self.nodes.append(helper.make_node("Conv", inputs, [y], **given))
        return y

    def add(self, op: str, inputs: list[str], y: str, **given: Any) -> str:
        """Any other node."""
        self.nodes.append(helper.make_node(op, inputs, [y], **given))
        return y

    def model(self, shape: list[Any], outputs: list[str], opset: int = 21) -> Any:
        """What was made, of an input x."""
        return model_of(self.nodes, {"x": (FLOAT, shape)}, outputs, self.constants, opset)


def small_network(rng: np.random.Generator, dtype: Any = np.uint8) -> Any:
    """Convolutions of all kinds, bounds, a sum, a mean and a product."""
    q, low = Qdq(rng, dtype), 0 if dtype == np.uint8 else -128
    q.pair("x", 0.03, low + 117)
    q.conv("x", "a", (24, 3, 3, 3), strides=[2, 2], pads=[0, 0, 1, 1])
    q.add("Relu", ["a"], "ar")
    q.pair("ar", 0.012, low)
    q.conv("ar", "b", (24, 1, 3, 3), group=24, pads=[1, 1, 1, 1])
    q.constants |= {"zero": np.array(0, np.float32), "two": np.array(2, np.float32)}
    q.add("Clip", ["b", "zero", "two"], "bc")
    q.pair("bc", 0.01, low)  # a Clip that is narrower than the bytes
    q.conv("bc", "c", (80, 24, 1, 1))
    q.pair("c", 0.02, low + 120)
    q.conv("c", "d", (80, 1, 5, 5), group=80, pads=[2, 2, 2, 2])
    q.pair("d", 0.02, low + 130)
    q.add("Add", ["c_d", "d_d"], "e")
    q.pair("e", 0.03, low + 125)
    q.add("GlobalAveragePool", ["e_d"], "f")
    q.pair("f", 0.01, low + 128)
    q.add("Flatten", ["f_d"], "g")
    q.pair("g", 0.01, low + 128)
    inputs = ["g_d", q.weights("h_w", (10, 80)), q.bias("h_b", "g", "h_w", 10)]
    q.add("Gemm", inputs, "y", transB=1)
    return q.model(["n", 3, 27, 30], ["y"])


def kernels(network: Network, inputs: dict[str, Any]) -> list[str]:
    """That compute a network, all of it."""
    runs = network.plan(inputs).runs
    assert all(isinstance(run, NativeRegion) for run in runs)
    return [one.kernel for run in runs for one in run.operations]  # type: ignore[union-attr]


def onnxruntimes(model: Any, inputs: dict[str, np.ndarray], optimised: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(None, inputs)[0]
    return found


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_a_network_runs_on_integers(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    model = small_network(rng, dtype)
    x = rng.standard_normal((2, 3, 27, 30)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    results = []
    for threads in (1, 2, 3):
        with network_of(model, threads=threads) as network:
            found = network({"x": x})["y"]
            assert kernels(network, {"x": x}) == [
                "images_quantise", "convolution_u8", "depthwise_u8", "images_add_u8",
                "convolution_u8", "depthwise_u8", "images_add_u8", "images_mean_u8",
                "images_add_u8", "convolution_u8",
            ]  # fmt: skip
        results.append(found.tobytes())
    assert len(set(results)) == 1
    # Sums in floats are rounded: a byte that is between two may become the other.
    spread = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=0.02 * spread)
    np.testing.assert_allclose(onnxruntimes(model, {"x": x}), expected, atol=0.03 * spread)


def exact(model: Any, x: np.ndarray) -> np.ndarray:
    """What ONNX's reference gives for bytes, in float64: its sums of products are exact then."""
    wide = ReferenceEvaluator(model)
    found: np.ndarray = wide.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((40, 20, 1, 1), {}),
        ((16, 20, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
        ((20, 1, 3, 3), {"group": 20, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ((20, 1, 3, 3), {"group": 20, "dilations": [2, 2]}),
    ],
)
def test_a_convolution_rounds_as_onnx_does(shape: tuple[int, ...], given: Any) -> None:
    rng = np.random.default_rng(5)
    q = Qdq(rng)
    q.pair("x", 0.02, 100)
    q.conv("x", "a", shape, **given)
    q.pair("a", 0.02, 131, "y")
    model = q.model([2, 20, 9, 11], ["y"])
    x = rng.standard_normal((2, 20, 9, 11)).astype(np.float32)
    with network_of(model, threads=2) as network:
        found = np.rint(network({"x": x})["y"] / np.float32(0.02))
        assert len(kernels(network, {"x": x})) == 3
    steps = np.abs(found - np.rint(exact(model, x) / np.float32(0.02)))
    # Only where the float sum is rounded across the middle between two bytes.
    assert steps.max() <= 1 and (steps > 0).mean() < 1e-3


def test_sums_and_conversions_equal_the_reference() -> None:
    rng = np.random.default_rng(6)
    q = Qdq(rng)
    q.pair("x", 0.017, 31)
    q.pair("x_d", 0.023, 200)
    q.add("Add", ["x_d", "x_d_d"], "a")
    q.pair("a", 0.037, 117, "y")
    model = q.model([1, 20, 9, 11], ["y"])
    x = (rng.standard_normal((1, 20, 9, 11)) * 3).astype(np.float32)
    with network_of(model, threads=2) as network:
        np.testing.assert_array_equal(network({"x": x})["y"], exact(model, x))


def test_bytes_come_and_go_as_they_are() -> None:
    rng = np.random.default_rng(7)
    constants = {
        "s": np.array(0.02, np.float32), "z": np.array(-3, np.int8),
        "w": rng.integers(-127, 128, (32, 8, 1, 1)).astype(np.int8),
        "ws": rng.uniform(0.001, 0.002, 32).astype(np.float32), "wz": np.zeros(32, np.int8),
    }  # fmt: skip
    node = helper.make_node("QLinearConv", ["x", "s", "z", "w", "ws", "wz", "s", "z"], ["y"])
    model = model_of([node], {"x": (INT8, [1, 8, 5, 5])}, ["y"], constants)
    x = rng.integers(-128, 128, (1, 8, 5, 5)).astype(np.int8)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
        assert kernels(network, {"x": x}) == ["convolution_u8"]
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, onnxruntimes(model, {"x": x}))


@pytest.mark.parametrize("change", ["weight", "bias", "scale", "axis"])
def test_what_integers_do_not_do_is_not_changed(change: str) -> None:
    rng = np.random.default_rng(8)
    q = Qdq(rng)
    q.pair("x", 0.02, 100)
    q.conv("x", "a", (20, 20, 1, 1))
    q.pair("a", 0.02, 131, "y")
    if change == "weight":  # pairs of products of -128 do not fit in 16 bits
        q.constants["a_w_q"][0, 0] = -128
    elif change == "bias":  # no int32 of the products
        q.constants["a_b_s"] = q.constants["a_b_s"] * np.float32(1e9)
    elif change == "axis":  # scales of channels that are read
        (node,) = [one for one in q.nodes if one.output[0] == "a_w_d"]
        node.attribute[0].i = 1
    else:  # sums times scales might leave the integers
        q.constants["a_w_s"] = q.constants["a_w_s"] * np.float32(1e9)
    model = q.model([1, 20, 4, 4], ["y"])
    x = rng.standard_normal((1, 20, 4, 4)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
        assert [kind for kind, _ in network.plan({"x": x}).where()] == ["onnxruntime"]
    # Its fusion takes scales for those of other channels.
    right = onnxruntimes(model, {"x": x}, optimised=change != "axis")
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("bias", ["floats", "integers of a scale of their own"])
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_last_product_keeps_its_bias_in_floats(op: str, bias: str) -> None:
    rng = np.random.default_rng(10)
    q = Qdq(rng)
    q.pair("x", 0.02, 100)
    weights = q.weights("w", (20, 12), 1)
    if bias == "floats":
        q.constants["b"] = rng.standard_normal(12).astype(np.float32)
    else:
        codes = rng.integers(-2000, 2000, 12).astype(np.int32)
        q.constants |= {"b_q": codes, "b_s": np.array(1e-3, np.float32)}
        q.add("DequantizeLinear", ["b_q", "b_s"], "b")
    if op == "Gemm":
        q.add("Gemm", ["x_d", weights, "b"], "y")
    else:
        q.add("MatMul", ["x_d", weights], "product")
        q.add("Add", ["b", "product"], "y")
    model = q.model([3, 20], ["y"])
    x = rng.standard_normal((3, 20)).astype(np.float32)
    with network_of(model, threads=1) as network:
        found = network({"x": x})["y"]
        assert kernels(network, {"x": x}) == ["images_quantise", "convolution_u8"]
    np.testing.assert_allclose(found, exact(model, x), rtol=1e-5, atol=1e-6)


def test_operators_between_integers_are_computed_in_floats() -> None:
    rng = np.random.default_rng(9)
    q = Qdq(rng)
    q.pair("x", 0.02, 128)
    q.conv("x", "a", (16, 20, 1, 1))
    q.pair("a", 0.02, 131)
    q.add("Sin", ["a_d"], "b")
    q.pair("b", 0.008, 128)
    q.conv("b", "c", (16, 16, 1, 1))
    q.pair("c", 0.02, 131, "y")
    model = q.model([1, 20, 4, 4], ["y"])
    x = rng.standard_normal((1, 20, 4, 4)).astype(np.float32)
    with network_of(model, threads=2) as network:
        found = network({"x": x})["y"]
        kinds = [kind for kind, _ in network.plan({"x": x}).where()]
    assert kinds == ["headrace", "onnxruntime", "headrace"]
    np.testing.assert_allclose(found, exact(model, x), atol=0.041)


def test_a_conversion_that_both_sides_read_is_there_on_both() -> None:
    rng = np.random.default_rng(12)
    q = Qdq(rng)
    q.pair("x", 0.03, 117)
    before = "x"
    for y in ("k", "l", "m", "n", "o", "p", "a", "b", "c", "d"):
        q.conv(before, y, (16, 3 if y == "k" else 16, 1, 1))
        q.pair(y, 0.02, 120)
        before = y
    q.add("Sin", ["d_d"], "e")  # onnxruntime's
    q.pair("e", 0.01, 128)
    # c_d is what a convolution reads, too; by itself, the sum is no region that pays.
    q.add("Add", ["c_d", "e_d"], "f")
    q.pair("f", 0.02, 128)
    q.add("Sin", ["f_d"], "y")
    model = q.model(["n", 3, 6, 5], ["y"])
    x = {"x": rng.normal(size=(2, 3, 6, 5)).astype(np.float32)}
    with network_of(model, threads=2) as network:
        runs = network.plan(x).runs
        assert [isinstance(run, NativeRegion) for run in runs] == [True, False]
        (y,) = network(x).values()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (wanted,) = session.run(None, x)
    assert np.abs(y - wanted).max() <= 2 * 0.02  # what one rounding more or less makes of each


def test_a_view_of_bytes_that_the_host_computes_has_the_numbers_that_it_reads() -> None:
    """Of codes it would be another node, which reads what these are made of."""
    rng = np.random.default_rng(14)
    q = Qdq(rng)
    q.pair("x", 0.03, 117)
    before = "x"
    for y in ("k", "l", "m"):
        q.conv(before, y, (16, 16, 1, 1))
        q.pair(y, 0.02, 120)
        before = y
    q.add("Relu", ["x_d"], "r")  # of ours, and floats
    q.add("Add", ["r", "m_d"], "y")
    q.constants["to"] = np.array([0, 0, -1], np.int64)
    q.add("Reshape", ["x_d", "to"], "v")
    q.pair("v", 0.03, 117)
    q.add("Sin", ["v_d"], "s")
    q.add("Cos", ["s"], "z")
    model = q.model([2, 16, 6, 5], ["y", "z"])
    x = {"x": rng.normal(size=(2, 16, 6, 5)).astype(np.float32)}
    with network_of(model, threads=1) as network:
        runs = network.plan(x).runs
        assert [isinstance(run, NativeRegion) for run in runs] == [True, False]
        found = network(x)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    y, z = session.run(["y", "z"], x)
    np.testing.assert_allclose(found["y"], y, atol=0.021)
    np.testing.assert_allclose(found["z"], z, atol=1e-6)
