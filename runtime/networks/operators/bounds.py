"""Clip with constant bounds, and Relu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.kernels.convolution import INFINITE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Operation, bytes_of, image_of
from headrace.networks.operators.quantised_images import clip


def _relu(graph: Graph, node: Node) -> Operation | None:
    return _clamped(graph, node, 0.0, INFINITE)


def _clip(graph: Graph, node: Node) -> Operation | None:
    if bytes_of(graph, node.inputs[0]) is not None:
        return clip(graph, node)
    bounds = []
    for i, (name, default) in enumerate((("min", -INFINITE), ("max", INFINITE)), 1):
        value = float(node.attribute(name, default))  # before operator set 11
        if len(node.inputs) > i and node.inputs[i]:
            if node.inputs[i] not in graph.constants:
                return None
            value = float(graph.constants.array(node.inputs[i]))
        bounds.append(value)
    if not bounds[0] <= bounds[1]:
        return None
    return _clamped(graph, node, max(bounds[0], -INFINITE), min(bounds[1], INFINITE))


def _clamped(graph: Graph, node: Node, least: float, most: float) -> Operation | None:
    x = node.inputs[0]
    of = image_of(graph, x)
    if of is None or x in graph.constants:
        return None

    def slots(one: Operation, at: Mapping[str, int]) -> list[Any]:
        return [at[x], 0, at[one.makes], of.n_bytes // 64, one.least, one.most]

    return Operation("images_add", [x], node.outputs[0], slots, [node], least=least, most=most)


OPERATORS = {"Relu": _relu, "Clip": _clip}
