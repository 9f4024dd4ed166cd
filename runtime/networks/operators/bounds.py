"""Clip with constant bounds, and Relu."""

from __future__ import annotations

from headrace.kernels.finishes import INFINITE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Operation, bytes_of, image_of
from headrace.networks.operators.quantised_images import clip
from headrace.networks.operators.sums import sum_of
from headrace.networks.quantisation import named


def bounds_of(graph: Graph, node: Node) -> tuple[float, float] | None:
    """Least and most that Relu or Clip let through; None: they are no constants."""
    if node.op == "Relu":
        return 0.0, INFINITE
    bounds = []
    for i, (name, default) in enumerate((("min", -INFINITE), ("max", INFINITE)), 1):
        value = float(node.attribute(name, default))  # before operator set 11
        given = named(node.inputs, i)
        if given:
            if given not in graph.constants:
                return None
            value = float(graph.constants.array(given).reshape(-1)[0])
        bounds.append(value)
    return bounds[0], bounds[1]


def _bounded(graph: Graph, node: Node) -> Operation | None:
    if node.op == "Clip" and bytes_of(graph, node.inputs[0]) is not None:
        return clip(graph, node)
    bounds = bounds_of(graph, node)
    if bounds is None or not bounds[0] <= bounds[1]:
        return None
    return clamped(graph, node, max(bounds[0], -INFINITE), min(bounds[1], INFINITE))


def clamped(graph: Graph, node: Node, least: float, most: float) -> Operation | None:
    """One pass over the input that bounds it; None: it is no value of ours."""
    x = node.inputs[0]
    of = image_of(graph, x)
    if of is None or x in graph.constants:
        return None

    made = sum_of(node, [x], of)
    made.least, made.most = least, most
    return made


OPERATORS = {"Relu": _bounded, "Clip": _bounded}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Relu, Clip": "constant bounds",
}
