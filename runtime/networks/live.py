"""How large values are that a graph has at the same time."""

from __future__ import annotations

import math

import onnx

from headrace.networks.graph import Graph


def live_bytes(graph: Graph) -> int:
    """The most bytes that values of known shapes have at any moment."""
    last: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        last.update(dict.fromkeys(node.reads, i))
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    live = {name: value_bytes(graph, name) for name in graph.inputs}
    most = sum(live.values())
    for i, node in enumerate(graph.nodes):
        live.update({name: value_bytes(graph, name) for name in node.outputs})
        most = max(most, sum(live.values()))
        for name in (*node.reads, *node.outputs):
            if last.get(name, i) <= i:
                live.pop(name, None)
    return most


def value_bytes(graph: Graph, name: str) -> int:
    """Of a value; 0: its shape is not known, or it is no tensor of numbers."""
    of = graph.types.get(name)
    if of is None or of.shape is None or of.elem_type == onnx.TensorProto.STRING:
        return 0
    return math.prod(of.shape) * onnx.helper.tensor_dtype_to_np_dtype(of.elem_type).itemsize
