"""Concat, Split and Slice along channels: places in memory, or copies (`passes.in_place`).

Concat of the pixels of one image copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import JOINED, PART, Image, Operation, channel_axis, image_of


def _no_slots(one: Operation, at: Mapping[str, int]) -> list[Any]:
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
    return _one_behind_the_other(graph, node) if made in graph.channels_first else None


def _one_behind_the_other(graph: Graph, node: Node) -> Operation | None:
    """Pixels of several values as those of one."""
    made, whole = node.outputs[0], image_of(graph, node.outputs[0])
    if whole is None or whole.images != 1 or node.attribute("axis", 0) % 3 != 2:
        return None
    copies: list[Operation] = []
    first = 0
    for name in node.inputs:
        of = image_of(graph, name)
        assert of is not None
        copies.append(_copy_of_pixels(name, of, made, whole, first))
        first += of.pixels
    copies[0].nodes = [node]
    copies[0].also = copies[1:]
    return copies[0]


def _copy_of_pixels(x: str, of: Image, made: str, whole: Image, first: int) -> Operation:
    def slots(one: Operation, at: Mapping[str, int]) -> list[Any]:
        step = one.step(one.makes, whole)
        to = at[one.makes] + first * step
        return [at[x], to, of.pixels, of.channels, one.step(x, of), step]

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
        part = _part(graph, node, name, channel)
        if part is None:
            return None
        parts.append(part)
        channel += of.channels
    for part in parts[1:]:
        part.nodes = []  # a node counts once
    parts[0].also = parts[1:]
    return parts[0]


def _part(graph: Graph, node: Node, made: str, channel: int) -> Operation | None:
    x = node.inputs[0]
    if x in graph.constants or image_of(graph, x) is None or image_of(graph, made) is None:
        return None
    return Operation(PART, [x], made, _no_slots, [node], channel=channel)


def _slice(graph: Graph, node: Node) -> Operation | None:
    given = [np.asarray(node.attribute(name, [])) for name in ("starts", "ends", "axes")]
    for i, name in enumerate(node.inputs[1:4]):
        if name and name not in graph.constants:
            return None
        given[i] = graph.constants.array(name) if name else given[i]
    if len(node.inputs) > 4 and node.inputs[4]:
        name = node.inputs[4]
        if name not in graph.constants or (graph.constants.array(name) != 1).any():
            return None
    starts, _, axes = given
    axis = int(axes[0]) if len(axes) else 0
    shape = graph.shape(node.inputs[0])
    if len(starts) != 1 or shape is None or not _along_channels(graph, node.inputs[0], axis):
        return None
    size = shape[axis % len(shape)]
    start = int(starts[0])
    return _part(graph, node, node.outputs[0], min(size, start + size if start < 0 else start))


OPERATORS = {"Concat": _concat, "Split": _split, "Slice": _slice}
