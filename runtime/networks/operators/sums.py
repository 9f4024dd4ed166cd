"""Add of two values of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Operation, image_of


def added(graph: Graph, node: Node) -> Operation | None:
    """The sum; None: they do not lie the same."""
    a, b = node.inputs
    of = image_of(graph, a)
    same = graph.types.get(a) == graph.types.get(b)
    if of is None or not same or a in graph.constants or b in graph.constants:
        return None

    def slots(one: Operation, at: Mapping[str, int]) -> list[Any]:
        return [at[a], at[b], at[one.makes], of.n_bytes // 64, one.least, one.most]

    return Operation("images_add", [a, b], node.outputs[0], slots, [node])
