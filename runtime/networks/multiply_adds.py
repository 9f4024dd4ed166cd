"""How many multiply-adds an operator of a file takes, whoever computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headrace.networks.graph import Graph, Node

# Which input of a convolution has the weights.
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "FusedConv": 1}
_PRODUCTS = (
    "MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "Gemm", "QGemm",
)  # fmt: skip
_RECURRENT = ("LSTM", "GRU", "RNN")
_ATTENTION = ("Attention", "QAttention")  # of com.microsoft


def multiply_adds(graph: Graph, node: Node) -> int | None:
    """Of a node of the file: 0 if it is no product, None where shapes are not known.

    Args:
        graph: that has types of its values.
        node: of the file; what its inner graphs take is not known.
    """
    if any(one.HasField("g") or one.graphs for one in node.proto.attribute):
        return None
    if node.domain == "headrace":
        return 0  # it stands for nodes of the file, which have them
    if node.op in _CONVOLUTIONS:
        weights = _shape(graph, node.inputs[_CONVOLUTIONS[node.op]])
        return _times(_shape(graph, node.outputs[0]), weights and weights[1:])
    if node.op == "ConvTranspose":
        weights = _shape(graph, node.inputs[1])
        return _times(_shape(graph, node.inputs[0]), weights and weights[1:])
    if node.op == "MatMulNBits":
        return _times(_shape(graph, node.outputs[0]), [node.attribute("K", 0)])
    if node.op in _PRODUCTS:
        x = _shape(graph, node.inputs[0])
        turned = node.attribute("transA", 0)
        inner = x and x[-2 if turned and len(x) > 1 else -1 :][:1]
        return _times(_shape(graph, node.outputs[0]), inner)
    if node.op in _RECURRENT:
        x, w, r = (_shape(graph, name) for name in node.inputs[:3])
        known = None if w is None or r is None else [math.prod(w) + math.prod(r)]
        return _times(x and x[:2], known)
    if node.op in _ATTENTION and node.domain:
        x, w = (_shape(graph, name) for name in node.inputs[:2])
        if x is None or w is None or len(x) != 3:
            return None
        return math.prod(x[:2]) * (math.prod(w) + 2 * x[1] * (w[1] // 3))
    return 0


def _shape(graph: Graph, name: str) -> Sequence[int] | None:
    of = graph.type(name)
    return None if of is None else of.shape


def _times(one: Sequence[int] | None, other: Sequence[int] | None) -> int | None:
    return None if one is None or other is None else math.prod(one) * math.prod(other)
