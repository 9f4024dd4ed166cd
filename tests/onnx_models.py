"""Small ONNX models for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model_of(
    nodes: Sequence[Any], inputs: Mapping[str, tuple[int, Any]], outputs: Sequence[str],
    constants: Mapping[str, np.ndarray] | None = None, opset: int = 21,
) -> Any:  # fmt: skip
    """A ModelProto; inputs are types and shapes."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def linear(width: int = 64) -> tuple[Any, np.ndarray]:
    """x [batch, width] times w plus x, and w."""
    w = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "x"], ["y"]),
    ]
    return model_of(nodes, {"x": (FLOAT, ["batch", width])}, ["y"], {"w": w}), w


def save(model: Any, path: Path, external: bool = False) -> Path:
    """Write a model, with its weights in `weights.bin` beside it if `external`."""
    more: dict[str, Any] = {}
    if external:
        more = {
            "save_as_external_data": True,
            "location": "weights.bin",
            "size_threshold": 0,
        }
    onnx.save(model, path, **more)
    return path


def random_network(rng: np.random.Generator, *, images: int = 2) -> Any:
    """A residual network of convolutions of all kinds with what stands between them."""
    constants: dict[str, np.ndarray] = {}
    nodes: list[Any] = []

    def weights(name: str, *shape: int) -> str:
        scale = float(np.prod(shape[1:])) ** -0.5
        constants[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
        return name

    def conv(x: str, y: str, *shape: int, bias: bool = True, **attributes: Any) -> str:
        inputs = [x, weights(f"{y}_w", *shape)]
        if bias:
            constants[f"{y}_b"] = rng.standard_normal(shape[0]).astype(np.float32)
            inputs.append(f"{y}_b")
        nodes.append(helper.make_node("Conv", inputs, [y], **attributes))
        return y

    constants["six"], constants["zero"] = np.float32(6), np.float32(0)
    conv("x", "stem", 20, 3, 3, 3, strides=[2, 2], pads=[1, 1, 0, 0])
    nodes.append(helper.make_node("Clip", ["stem", "zero", "six"], ["stem6"]))
    conv("stem6", "wide", 40, 20, 1, 1)
    nodes.append(helper.make_node("Relu", ["wide"], ["wide_r"]))
    conv("wide_r", "deep", 40, 1, 5, 5, group=40, auto_pad="SAME_UPPER")
    nodes.append(helper.make_node("Clip", ["deep", "zero", "six"], ["deep6"]))
    conv("deep6", "back", 20, 40, 1, 1, bias=False)
    nodes.append(helper.make_node("Add", ["stem6", "back"], ["sum"]))
    conv("sum", "apart", 33, 20, 3, 3, dilations=[2, 2], auto_pad="VALID")
    nodes.append(helper.make_node("Add", ["apart", "apart"], ["twice"]))
    nodes.append(helper.make_node("Relu", ["twice"], ["twice_r"]))
    nodes.append(helper.make_node("GlobalAveragePool", ["twice_r"], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    weights("fc_w", 10, 33)
    constants["fc_b"] = rng.standard_normal(10).astype(np.float32)
    nodes.append(helper.make_node("Gemm", ["flat", "fc_w", "fc_b"], ["y"], transB=1))
    return model_of(nodes, {"x": (FLOAT, [images, 3, 29, 34])}, ["y", "sum"], constants)
