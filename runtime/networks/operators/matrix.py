"""Gemm, MatMul and Linear (x w + bias) of rows with constant float32 weights.

They are convolutions of single pixels. MatMul of two values that come at run time is none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from headrace.kernels.geometry import Geometry
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import PADDED, Image, Operation, image_of, in_rows
from headrace.networks.operators.convolution import convolution
from headrace.networks.operators.product import product_of_values
from headrace.networks.quantisation import named


def _gemm(graph: Graph, node: Node) -> Operation | None:
    if node.attribute("transA", 0) or node.attribute("alpha", 1.0) != 1.0:
        return None
    name = named(node.inputs, 2)
    if name and node.attribute("beta", 1.0) != 1.0:
        return None
    return _product(graph, node, bool(node.attribute("transB", 0)), name)


def _matmul(graph: Graph, node: Node) -> Operation | None:
    if node.inputs[1] not in graph.constants:
        return product_of_values(graph, node)
    return _product(graph, node, False, "")


def _linear(graph: Graph, node: Node) -> Operation | None:
    return _product(graph, node, False, node.inputs[2])


def _product(graph: Graph, node: Node, transposed: bool, bias_name: str) -> Operation | None:
    x, name = node.inputs[:2]
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    if read is None or written is None or name not in graph.constants or x in graph.constants:
        return None
    of = graph.constants.type(name)
    if len(of.shape or ()) != 2 or of.elem_type != onnx.TensorProto.FLOAT:
        return None
    if not in_rows(graph, x) or read.images != written.images:
        return None
    if (of.shape or ())[:: -1 if transposed else 1] != (read.channels, written.channels):
        return None
    if bias_name and bias_name not in graph.constants:
        return None
    bias = np.zeros(written.padded, np.float32)
    if bias_name:
        given = graph.constants.array(bias_name)
        if given.size not in (1, written.channels) or given.shape[:-1].count(1) != given.ndim - 1:
            return None  # another bias for each row
        bias[: written.channels] = given.reshape(-1)

    def weights() -> np.ndarray:
        w = graph.constants.array(name)
        return (w.T if transposed else w)[None, None]

    def runs() -> Iterator[tuple[int, int, np.ndarray]]:
        for first, rows in graph.constants.rows(name, PADDED if transposed else 1):
            yield (0, first, rows.T[None, None]) if transposed else (first, 0, rows[None, None])

    geometry = Geometry(1, (1, read.images), (1, read.images), (1, 1))
    row = Image(1, 1, read.images, read.channels), Image(1, 1, read.images, written.channels)
    key = graph.constants.identity(name)
    return convolution(
        node, geometry, row, (read.channels, written.channels), weights,
        None if key is None else (key, transposed), bias, graph.constants,
        runs=runs if graph.constants.in_runs(name) else None,
    )  # fmt: skip


OPERATORS = {"Gemm": _gemm, "MatMul": _matmul, "headrace.Linear": _linear}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Gemm, MatMul": (
        "rows of float32 (of 2 or 3 dimensions) times constant weights; MatMul also two "
        "values: matrices, or batches of matrices of 3 dimensions"
    ),
}
