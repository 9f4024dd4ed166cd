"""GlobalAveragePool, and ReduceMean of all pixels."""

from __future__ import annotations

from typing import Any

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, image_of


def _global_average(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    if read is None or written is None:
        return None
    if len(graph.shape(x) or ()) != 4 and not averages_pixels(graph, node):
        return None
    if x not in graph.channels_first and len(graph.shape(x) or ()) == 3:
        return None

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], at[one.makes], read.images, read.pixels, read.padded]

    return Operation("images_mean", [x], node.outputs[0], slots, [node])


def averages_pixels(graph: Graph, node: Node) -> bool:
    """Whether it gives [images, channels] of [images, channels, pixels]."""
    before, after = (graph.shape(name) or () for name in (node.inputs[0], node.outputs[0]))
    return node.op == "ReduceMean" and len(before) == 3 and after == before[:2]


def _reduce_mean(graph: Graph, node: Node) -> Operation | None:
    axes = node.attribute("axes")
    if len(node.inputs) > 1 and node.inputs[1]:
        if node.inputs[1] not in graph.constants:
            return None
        axes = graph.constants.array(node.inputs[1]).tolist()
    rank = len(graph.shape(node.inputs[0]) or ())
    if axes is None or sorted(axis % max(1, rank) for axis in axes) != list(range(2, rank)):
        return None
    return _global_average(graph, node)


OPERATORS = {"GlobalAveragePool": _global_average, "ReduceMean": _reduce_mean}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "GlobalAveragePool, ReduceMean": "of all pixels; ReduceMean also of one dimension of them",
}
