"""GlobalAveragePool, and ReduceMean of all pixels, or of all rows (or rows and columns)."""

from __future__ import annotations

import math
from typing import Any

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Image, Operation, image_of, in_rows


def _global_average(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    if read is None or written is None or len(graph.shape(x) or ()) != 4 or x in graph.as_rows:
        return None
    return _mean(node, read, read.images, read.pixels)


def _mean(node: Node, read: Image, images: int, pixels: int) -> Operation:
    x = node.inputs[0]

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], at[one.makes], images, pixels, read.padded]

    return Operation("images_mean", [x], node.outputs[0], slots, [node])


def averages_pixels(graph: Graph, node: Node) -> bool:
    """Whether it gives [images, channels] of [images, channels, pixels]."""
    before, after = (graph.shape(name) or () for name in (node.inputs[0], node.outputs[0]))
    return node.op == "ReduceMean" and len(before) == 3 and after == before[:2]


def averages_rows(graph: Graph, node: Node) -> bool:
    """Whether it gives [images, channels] of [images, rows, columns, channels]."""
    before, after = (graph.shape(name) or () for name in (node.inputs[0], node.outputs[0]))
    return node.op == "ReduceMean" and len(before) == 4 and after == (before[0], before[3])


def _axes(graph: Graph, node: Node) -> list[int] | None:
    """In order, counted from the front; None: all, or they are not known."""
    axes = node.attribute("axes")
    if len(node.inputs) > 1 and node.inputs[1]:
        if node.inputs[1] not in graph.constants:
            return None
        axes = graph.constants.array(node.inputs[1]).tolist()
    rank = len(graph.shape(node.inputs[0]) or ())
    return None if axes is None or not rank else sorted(axis % rank for axis in axes)


def _reduce_mean(graph: Graph, node: Node) -> Operation | None:
    axes, x = _axes(graph, node), node.inputs[0]
    shape = graph.shape(x) or ()
    if axes is None or not shape:
        return None
    if len(shape) == 4 and x not in graph.as_rows:
        return _global_average(graph, node) if axes == [2, 3] else None
    read, made = image_of(graph, x), image_of(graph, node.outputs[0])
    if read is None or made is None or made.channels != read.channels:
        return None
    if x in graph.channels_first:
        pixels = averages_pixels(graph, node) and axes == [2]
        return _mean(node, read, read.images, read.pixels) if pixels else None
    if not in_rows(graph, x):
        return None
    # Of all rows of each one of the batch; how the result lies follows from its channels.
    if axes != [*range(1, len(shape) - 1)]:
        return None
    if (made.images, made.pixels) != (shape[0], 1):
        return None
    return _mean(node, read, shape[0], math.prod(shape[1:-1]))


OPERATORS = {"GlobalAveragePool": _global_average, "ReduceMean": _reduce_mean}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "GlobalAveragePool, ReduceMean": (
        "of all pixels, of one dimension as well, or with channels last; ReduceMean also of all "
        "rows of each of a batch"
    ),
}
