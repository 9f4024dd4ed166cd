"""Concat and Split along channels: places in memory, or copies (`passes.in_place`).

Concat of pixels copies.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import onnx

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    JOINED,
    PART,
    Addresses,
    Image,
    Operation,
    Weight,
    channel_axis,
    image_of,
)

MOST_COPIES = 64  # of runs of pixels, in one operator


def _no_slots(one: Operation, at: Addresses) -> list[Any]:
    raise AssertionError(one.kernel)


def _along_channels(graph: Graph, name: str, axis: int) -> bool:
    """Whether a dimension of a value is its channels."""
    rank = len(graph.shape(name) or ())
    return rank > 0 and axis % rank == channel_axis(graph, name)


def _concat(graph: Graph, node: Node) -> Operation | None:
    made, axis = node.outputs[0], node.attribute("axis", 0)
    if image_of(graph, made) is None:
        return None
    if not _along_channels(graph, made, axis):
        return _one_behind_the_other(graph, node)
    if any(name in graph.constants or image_of(graph, name) is None for name in node.inputs):
        return None
    return Operation(JOINED, node.inputs, made, _no_slots, [node])


def _one_behind_the_other(graph: Graph, node: Node) -> Operation | None:
    """Pixels of several values and constants as those of one."""
    made, shape = node.outputs[0], graph.shape(node.outputs[0]) or ()
    whole, channels = image_of(graph, made), channel_axis(graph, made)
    axis = node.attribute("axis", 0) % max(1, len(shape))
    outer = math.prod(n for i, n in enumerate(shape[:axis]) if i != channels)
    if whole is None or outer * len(node.inputs) > MOST_COPIES:
        return None
    if outer > 1 and axis > 2:  # of each row of an image: it is better taken for rows of channels
        return None
    if all(name in graph.constants for name in node.inputs):
        return None
    copies: list[Operation] = []
    each = whole.images * whole.pixels // outer
    first = 0
    for name in node.inputs:
        of = _image_of_part(graph, name, made)
        if of is None or of.channels != whole.channels:
            return None
        count = of.images * of.pixels // outer
        own: dict[str, np.ndarray | Weight] = {}
        if name in graph.constants:
            own["pixels"] = _pixels_of(graph, name, channels, of)
        for i in range(outer):
            run = _Run(i * count, i * each + first, count)
            copies.append(_copy_of_pixels(name, of, made, whole, run, own))
        first += count
    copies[0].nodes = [node]
    copies[0].also = copies[1:]
    return copies[0]


def _image_of_part(graph: Graph, name: str, made: str) -> Image | None:
    """How a value or constant lies that becomes a part of another; None: in another way."""
    if name not in graph.constants:
        same = channel_axis(graph, name) == channel_axis(graph, made)
        return image_of(graph, name) if same else None
    of = graph.constants.type(name)
    if of.elem_type != onnx.TensorProto.FLOAT or len(of.shape or ()) != len(
        graph.shape(made) or ()
    ):
        return None
    shape = of.shape or ()
    channels = shape[channel_axis(graph, made)]
    if 0 in shape:
        return None
    return Image(math.prod(shape) // channels, 1, 1, channels)


def _pixels_of(graph: Graph, name: str, channels: int, of: Image) -> Weight:
    """A constant pixel by pixel."""

    def make() -> np.ndarray:
        pixels = np.moveaxis(graph.constants.array(name), channels, -1).reshape(-1, of.channels)
        return np.pad(pixels, ((0, 0), (0, of.padded - of.channels)))

    key = graph.constants.identity(name)
    return Weight(of.n_bytes, make, None if key is None else ("pixels", key, channels))


class _Run(NamedTuple):
    """Pixels that lie one behind the other: the first one of a part, its place, and how many."""

    first: int
    place: int
    pixels: int


def _copy_of_pixels(
    x: str, of: Image, made: str, whole: Image, run: _Run, own: dict[str, np.ndarray | Weight]
) -> Operation:
    """A copy of pixels of a value, or of those that the operation has for itself."""

    def slots(one: Operation, at: Addresses) -> list[Any]:
        step, x_step = one.step(one.makes, whole), one.step(x, of)
        begin = at.own["pixels"] if own else at[x]
        to = at[one.makes] + run.place * step
        return [begin + run.first * x_step, to, run.pixels, of.channels, x_step, step]

    return Operation("images_copy", [] if own else [x], made, slots, [], own)


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
    "Concat, Split": (
        "along channels; Concat also pixels (of values and constants), in up to 64 runs"
    ),
}
