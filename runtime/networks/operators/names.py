"""Operators that only give a value another name or shape, where it lies in memory as before."""

from __future__ import annotations

from headrace.kernels.finishes import INFINITE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Operation, bytes_of, image_of
from headrace.networks.operators.bounds import clamped
from headrace.networks.operators.quantised_images import unchanged


def _same(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    if bytes_of(graph, x) is not None:
        return unchanged(graph, node) if len(node.outputs) == 1 else None
    of, made = image_of(graph, x), image_of(graph, node.outputs[0])
    if of is None or made is None or x in graph.constants or len(node.outputs) > 1:
        return None
    if (of.images, of.pixels, of.channels) != (made.images, made.pixels, made.channels):
        return None
    found = clamped(graph, node, -INFINITE, INFINITE)
    if found is not None and of != made:
        found.windows = None  # its pixels have other neighbours
    return found


OPERATORS = dict.fromkeys(
    ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"), _same
)
