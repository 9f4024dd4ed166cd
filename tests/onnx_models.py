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
