"""Softmax of any one dimension."""

from __future__ import annotations

import math
from typing import Any

from headrace.kernels.softmax_rows import CACHE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Image, Operation, channel_axis, image_of


def axis_of(graph: Graph, node: Node, shape: tuple[int, ...]) -> int | None:
    """The one dimension of a value of this shape that a Softmax is of; None: of several."""
    newer = graph.opsets.get("", 0) >= 13
    axis: int = node.attribute("axis", -1 if newer else 1) % len(shape)
    # Before operator set 13 all dimensions from the axis on are one.
    if not newer and shape[axis + 1 :].count(1) != len(shape) - axis - 1:
        return None
    return axis


def _softmax(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    of, shape = image_of(graph, x), graph.shape(x) or ()
    if of is None or x in graph.constants:
        return None
    axis = axis_of(graph, node, shape)
    if axis is None:
        return None
    channels = channel_axis(graph, x)
    if axis != channels:
        return _across(node, of, shape, axis, channels)

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], at[one.makes], of.images * of.pixels, of.channels, CACHE]

    return Operation("softmax_rows_f32", [x], node.outputs[0], slots, [node])


def _across(
    node: Node, of: Image, shape: tuple[int, ...], axis: int, channels: int
) -> Operation:  # fmt: skip
    """Of another dimension than that of channels, which are innermost."""
    sizes = [n for i, n in enumerate(shape) if i != channels]
    place = axis - (axis > channels)
    outer, n = math.prod(sizes[:place]), sizes[place]
    vectors = math.prod(sizes[place + 1 :]) * of.padded // 16

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[one.reads[0]], at[one.makes], outer, n, vectors]

    return Operation("softmax_across_f32", [node.inputs[0]], node.outputs[0], slots, [node])


OPERATORS = {"Softmax": _softmax}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Softmax": "of any one of 2 to 4 dimensions; rows above 256 Ki values in two passes",
}
