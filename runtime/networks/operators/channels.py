"""Concat and Split along channels: places in memory, or copies (`passes.in_place`).

Concat of pixels copies.
"""

from __future__ import annotations

from typing import Any

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    JOINED,
    PART,
    Addresses,
    Image,
    Operation,
    channel_axis,
    image_of,
)


def _no_slots(one: Operation, at: Addresses) -> list[Any]:
    raise AssertionError(one.kernel)


def _along_channels(graph: Graph, name: str, axis: int) -> bool:
    """Whether a dimension of a value is its channels."""
    rank = len(graph.shape(name) or ())
    return rank > 0 and axis % rank == channel_axis(graph, name)


def _concat(graph: Graph, node: Node) -> Operation | None:
    made, axis = node.outputs[0], node.attribute("axis", 0)
    values = [*node.inputs, made]
    if any(name in graph.constants or image_of(graph, name) is None for name in values):
        return None
    if _along_channels(graph, made, axis):
        return Operation(JOINED, node.inputs, made, _no_slots, [node])
    return _one_behind_the_other(graph, node)


def _one_behind_the_other(graph: Graph, node: Node) -> Operation | None:
    """Pixels of several values as those of one, which all dimensions further out have once."""
    made, shape = node.outputs[0], graph.shape(node.outputs[0]) or ()
    whole, channels = image_of(graph, made), channel_axis(graph, made)
    axis = node.attribute("axis", 0) % max(1, len(shape))
    if whole is None or any(n != 1 for i, n in enumerate(shape[:axis]) if i != channels):
        return None
    if any(channel_axis(graph, name) != channels for name in node.inputs):
        return None
    copies: list[Operation] = []
    first = 0
    for name in node.inputs:
        of = image_of(graph, name)
        assert of is not None
        copies.append(_copy_of_pixels(name, of, made, whole, first))
        first += of.images * of.pixels
    copies[0].nodes = [node]
    copies[0].also = copies[1:]
    return copies[0]


def _copy_of_pixels(x: str, of: Image, made: str, whole: Image, first: int) -> Operation:
    def slots(one: Operation, at: Addresses) -> list[Any]:
        step = one.step(one.makes, whole)
        to = at[one.makes] + first * step
        pixels = of.images * of.pixels
        return [at[x], to, pixels, of.channels, one.step(x, of), step]

    return Operation("images_copy", [x], made, slots, [])


def _split(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    if not _along_channels(graph, x, node.attribute("axis", 0)):
        return None
    parts: list[Operation] = []
    channel = 0
    for name in node.outputs:
        of = image_of(graph, name)
        if of is None:
            return None
        one = part(graph, node, name, channel)
        if one is None:
            return None
        parts.append(one)
        channel += of.channels
    for one in parts[1:]:
        one.nodes = []  # a node counts once
    parts[0].also = parts[1:]
    return parts[0]


def part(graph: Graph, node: Node, made: str, channel: int) -> Operation | None:
    """Some channels of a node's first input, from one on."""
    x = node.inputs[0]
    if x in graph.constants or image_of(graph, x) is None or image_of(graph, made) is None:
        return None
    return Operation(PART, [x], made, _no_slots, [node], channel=channel)


OPERATORS = {"Concat": _concat, "Split": _split}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Concat, Split": "along channels; Concat also pixels, where dimensions further out are 1",
}
