"""Softmax of the last dimension, or of the channels of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.kernels.softmax_rows import CACHE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Operation, image_of


def _softmax(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    of, shape = image_of(graph, x), graph.shape(x) or ()
    if of is None or x in graph.constants:
        return None
    newer = graph.opsets.get("", 0) >= 13
    axis = node.attribute("axis", -1 if newer else 1) % len(shape)
    channels = 1 if len(shape) == 4 else len(shape) - 1
    # Before operator set 13 all dimensions from the axis on are one.
    if axis != channels or (not newer and shape[axis + 1 :].count(1) != len(shape) - axis - 1):
        return None

    def slots(one: Operation, at: Mapping[str, int]) -> list[Any]:
        return [at[x], at[one.makes], of.images * of.pixels, of.channels, CACHE]

    return Operation("softmax_rows_f32", [x], node.outputs[0], slots, [node])


OPERATORS = {"Softmax": _softmax}
