"""What exporters write for one operator of newer operator sets, and what only looks like it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_encoders import Builder
from onnx_models import FLOAT, model_of
from test_native_networks import native, reference

from headrace.networks.network import network_of

WIDTH = 40


def kernels(b: Builder, y: str, opset: int = 17) -> tuple[list[str], float]:
    """Kernels of x [2, 5, WIDTH] to y, whose result is onnxruntime's within this share of it."""
    model = model_of(b.nodes, {"x": (FLOAT, [2, 5, WIDTH])}, [y], b.constants, opset)
    x = np.random.default_rng(5).standard_normal((2, 5, WIDTH)).astype(np.float32) * 3 + 1
    with network_of(model, threads=2) as network:
        regions = native(network, {"x": x})
        found, expected = network({"x": x})[y], reference(model, {"x": x})[y]
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    return [one.kernel for region in regions for one in region.operations], off


def tanh_gelu(b: Builder, x: str, spelling: str, factor: float = 0.044715) -> str:
    root = (2 / np.pi) ** 0.5
    if spelling == "cube":  # transformers' "gelu_new"
        cube = b.add("Mul", b.add("Pow", x, b.put(3)), b.put(factor))
        inner = b.add("Mul", b.add("Add", x, cube), b.put(root))
    elif spelling == "products":  # PyTorch's, before operator set 20
        cube = b.add("Mul", b.put(factor), b.add("Mul", x, b.add("Mul", x, x)))
        inner = b.add("Mul", b.put(root), b.add("Add", x, cube))
    else:  # transformers' "gelu_fast"
        square = b.add("Mul", b.add("Mul", x, b.put(factor)), x)
        scaled = b.add("Mul", x, b.put(root))
        inner = b.add("Mul", scaled, b.add("Add", b.put(1), square))
    one_and = b.add("Add", b.put(1), b.add("Tanh", inner))
    if spelling == "products":
        return b.add("Mul", b.put(0.5), b.add("Mul", x, one_and))
    return b.add("Mul", b.add("Mul", x, b.put(0.5)), one_and)


@pytest.mark.parametrize("spelling", ["cube", "products", "squares"])
def test_gelu_of_tanh(spelling: str) -> None:
    b = Builder(np.random.default_rng(1))
    found, off = kernels(b, tanh_gelu(b, "x", spelling))
    assert found == ["gelu_tanh_f32"]
    assert off < 1e-5


def test_what_is_nearly_gelu_of_tanh() -> None:
    b = Builder(np.random.default_rng(1))
    found, off = kernels(b, tanh_gelu(b, "x", "products", 0.0448))
    assert "gelu_tanh_f32" not in found
    assert off < 1e-5


def root_mean_square(b: Builder, x: str, spelling: str, power: float = 2) -> str:
    square = b.add("Mul", x, x) if spelling == "product" else b.add("Pow", x, b.put(power))
    mean = b.add("ReduceMean", square, axes=[-1])
    root = b.add("Sqrt", b.add("Add", mean, b.put(1e-5)))
    if spelling == "quotient":
        return b.add("Div", x, root)
    if spelling == "one":
        return b.add("Mul", x, b.add("Div", b.put(1), root))
    return b.add("Mul", b.add("Reciprocal", root), x)


@pytest.mark.parametrize("spelling", ["quotient", "one", "product"])
def test_rms_norm(spelling: str) -> None:
    b = Builder(np.random.default_rng(1))
    weight, _ = b.scale(WIDTH)
    y = b.add("Mul", weight, root_mean_square(b, "x", spelling))
    found, off = kernels(b, y)
    assert found == ["layer_norm_f32"]
    assert off < 1e-5


def test_what_is_nearly_rms_norm() -> None:
    b = Builder(np.random.default_rng(1))
    weight, _ = b.scale(WIDTH)
    y = b.add("Mul", weight, root_mean_square(b, "x", "one", 4))
    found, off = kernels(b, y)
    assert "layer_norm_f32" not in found
    assert off < 1e-5


def test_rms_norm_of_its_own_operator() -> None:
    model: Any = model_of(
        [helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=1e-3)],
        {"x": (FLOAT, [2, 5, WIDTH])}, ["y"],
        {"w": np.linspace(-1, 2, WIDTH, dtype=np.float32)}, opset=23,
    )  # fmt: skip
    x = np.random.default_rng(5).standard_normal((2, 5, WIDTH)).astype(np.float32)
    with network_of(model, threads=2) as network:
        (region,) = native(network, {"x": x})
        assert [one.kernel for one in region.operations] == ["layer_norm_f32"]
        found = network({"x": x})["y"]
    scale = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3)
    expected = x * scale * np.linspace(-1, 2, WIDTH)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_without_bias() -> None:
    b = Builder(np.random.default_rng(1))
    apart = b.add("Sub", "x", b.add("ReduceMean", "x", axes=[-1]))
    variance = b.add("ReduceMean", b.add("Mul", apart, apart), axes=[-1])
    root = b.add("Sqrt", b.add("Add", variance, b.put(1e-6)))
    y = b.add("Mul", b.add("Div", apart, root), b.scale(WIDTH)[0])
    found, off = kernels(b, y)
    assert found == ["layer_norm_f32"]
    assert off < 1e-5


def test_a_weight_of_several_names() -> None:
    """PyTorch's exporter gives weights that layers share another name by Identity."""
    b = Builder(np.random.default_rng(1))
    w, back = b.weights(WIDTH, 600), b.weights(600, WIDTH)  # too large to be computed ahead
    y = b.add("MatMul", b.add("MatMul", "x", w), back)
    y = b.add("MatMul", y, b.add("Identity", b.add("Identity", w)))
    found, off = kernels(b, b.add("MatMul", y, b.add("Identity", back)))
    assert found == ["convolution_f32"] * 4
    assert off < 1e-5


def heads_of(b: Builder, x: str, perm: list[int]) -> str:
    split = b.add("Reshape", x, b.put([2, 5, 4, WIDTH // 4], np.int64))
    return b.add("Transpose", split, perm=perm)


def attention(b: Builder, masks: list[Any], flat: bool) -> str:
    """Of x; products take all tokens as one matrix where it is flat."""
    rows = b.put([10, WIDTH], np.int64)
    weights = b.weights(WIDTH, 3 * WIDTH)
    together = b.add("MatMul", b.add("Reshape", "x", rows) if flat else "x", weights)
    if flat:
        together = b.add("Reshape", together, b.put([2, 5, 3 * WIDTH], np.int64))
    q, k, v = (
        b.add("Slice", together, *(b.put([n], np.int64) for n in (i * WIDTH, (i + 1) * WIDTH, 2)))
        for i in range(3)
    )
    q, v = (heads_of(b, one, [0, 2, 1, 3]) for one in (q, v))
    scores = b.add("MatMul", q, heads_of(b, k, [0, 2, 3, 1]))
    scores = b.add("Div", scores, b.put((WIDTH // 4) ** 0.5))
    for i, mask in enumerate(masks):
        added = b.put(mask)
        scores = b.add("Add", *((added, scores) if i else (scores, added)))
    mixed = b.add("MatMul", b.add("Softmax", scores, axis=-1), v)
    turned = b.add("Transpose", mixed, perm=[0, 2, 1, 3])
    if not flat:
        return b.add("Reshape", turned, b.put([2, 5, WIDTH], np.int64))
    mixed = b.add("MatMul", b.add("Reshape", turned, rows), b.weights(WIDTH, WIDTH))
    return b.add("Reshape", mixed, b.put([2, 5, WIDTH], np.int64))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("opset", [14, 17])
def test_attention_with_two_things_added(opset: int, flat: bool) -> None:
    """A mask and biases of places, and products of all tokens as GPT-2 has them."""
    rng = np.random.default_rng(1)
    b = Builder(rng)
    mask = np.where(rng.random((2, 1, 1, 5)) < 0.3, np.finfo(np.float32).min, 0)
    mask[..., 0] = 0
    y = attention(b, [rng.standard_normal((1, 4, 5, 5)), mask], flat)
    found, off = kernels(b, y, opset)
    assert "attention_rows_f32" in found
    assert set(found) <= {"attention_rows_f32", "convolution_f32", "images_add"}
    assert off < 1e-5
