"""Operators that only give a value another name or shape, where it lies in memory as before."""

from __future__ import annotations

from typing import Any

from headrace.kernels.finishes import INFINITE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, bytes_of, image_of
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


def _turned(graph: Graph, node: Node) -> Operation | None:
    """Channels that are put last, or second, where they lie innermost anyhow."""
    x, y = node.inputs[0], node.outputs[0]
    into = {
        (0, 2, 1): (graph.channels_first, x, y), (0, 3, 1, 2): (graph.as_rows, x, y),
        (0, 2, 3, 1): (graph.as_rows, y, x),
    }.get(tuple(node.attribute("perm", ())))  # fmt: skip
    if into is None:
        return None
    lie, first, second = into
    if lie is graph.channels_first and not {x, y} & lie:
        return _turned_rows(graph, node)
    if (first in lie) == (second in lie) or (lie is graph.as_rows and first not in lie):
        return None
    of, made = image_of(graph, x), image_of(graph, y)
    if of is None or made is None or x in graph.constants or of.channels != made.channels:
        return None
    found = clamped(graph, node, -INFINITE, INFINITE)
    if found is not None:
        found.windows = None
    return found


def _turned_rows(graph: Graph, node: Node) -> Operation | None:
    """Rows and channels of each of a batch in each other's place: rows are read as planes."""
    x, y = node.inputs[0], node.outputs[0]
    shape, of, made = graph.shape(x) or (), image_of(graph, x), image_of(graph, y)
    if of is None or made is None or x in graph.constants:
        return None
    batch, rows, channels = shape

    def slots(one: Operation, at: Addresses) -> list[Any]:
        sizes = [batch, rows, 1, channels, of.pixel_bytes, of.pixel_bytes]
        return [at[x], at[one.makes], *sizes, made.padded]

    return Operation("images_gather", [x], y, slots, [node])


OPERATORS = {"Transpose": _turned} | dict.fromkeys(
    ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"), _same
)
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Reshape, Flatten, Squeeze, Unsqueeze, Transpose, Identity, Dropout": (
        "where nothing moves in memory (channels of rows of pixels are innermost anyhow, as "
        "are those of images [images, rows, columns, channels] between rows and images); "
        "Transpose also of rows and channels, in a batch of three dimensions"
    ),
}
