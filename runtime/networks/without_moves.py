"""Nodes that give what they read go, also where several of them undo each other.

Exporters leave names for names, conversions to the type that a value has, slices of all of it,
elements taken one by one in order, and dimensions of one element that come and go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import onnx

from headrace.networks.graph import Graph, Node

_ALWAYS = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten")
_OF_ONE = ("ReduceMean", "ReduceMax", "ReduceMin")  # of one element they are that
_MAYBE = ("Slice", "Cast")  # where type and shape stay


def without_moves(graph: Graph) -> Graph:
    """The graph less these nodes; those whose values are wanted by name stay."""
    fixed = {name for node in graph.nodes for name in node.captured} | set(graph.outputs)
    chains: dict[str, list[str]] = {}  # values of the same elements that are there before
    renamed: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node = reading(node, renamed)
        if _moves_nothing(graph, node):
            x, y = node.inputs[0], node.outputs[0]
            before = chains.get(x, [x])
            same = next((name for name in before if graph.types[name] == graph.types[y]), None)
            if same is not None and y not in fixed:
                renamed[y] = same
                continue
            chains[y] = [*before, y]
        nodes.append(node)
    return graph.of(nodes) if renamed else graph


def reading(node: Node, renamed: Mapping[str, str]) -> Node:
    """A node that reads other values instead."""
    if not any(name in renamed for name in node.inputs):
        return node
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[:] = [renamed.get(name, name) for name in node.inputs]
    return replace(node, proto=proto)


def _moves_nothing(graph: Graph, node: Node) -> bool:
    """Whether it gives all elements that it reads, in order and of the same type."""
    if node.domain or not node.inputs or len(node.outputs) != 1 or node.outputs[0] == "":
        return False
    x, y = (graph.types.get(name) for name in (node.inputs[0], node.outputs[0]))
    if x is None or y is None or x.shape is None or y.shape is None or x.elem_type != y.elem_type:
        return False
    if node.inputs[0] in graph.constants or math.prod(x.shape) != math.prod(y.shape):
        return False
    if node.op == "Slice" and _turns(graph, node):
        return False
    if node.op == "Gather":
        return _takes_all(graph, node)
    return node.op in (*_ALWAYS, *_OF_ONE) or (node.op in _MAYBE and x == y)


def _takes_all(graph: Graph, node: Node) -> bool:
    """Whether numbers are those of all elements of one dimension, in order."""
    ids, x = node.inputs[1], graph.shape(node.inputs[0]) or ()
    if ids not in graph.constants or len(x) != 1 or not graph.constants.is_small(ids):
        return False
    return bool((graph.constants.array(ids).reshape(-1) == range(x[0])).all())


def _turns(graph: Graph, node: Node) -> bool:
    """Whether a slice may go backwards."""
    steps = node.inputs[4] if len(node.inputs) > 4 else ""
    return bool(steps) and (
        steps not in graph.constants or bool((graph.constants.array(steps) < 0).any())
    )
