"""Sums of values of the same shape."""

from __future__ import annotations

from typing import Any

from headrace.kernels.geometry import Geometry
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    Addresses,
    Image,
    Operation,
    Slots,
    Windows,
    image_of,
    pixelwise,
)


def added(graph: Graph, node: Node) -> Operation | None:
    """The sum; None: they do not lie the same."""
    a, b = node.inputs
    of = image_of(graph, a)
    same = graph.types.get(a) == graph.types.get(b)
    if of is None or not same or a in graph.constants or b in graph.constants:
        return None
    return sum_of(node, [a, b], of)


def sum_of(node: Node, names: list[str], image: Image) -> Operation:
    """The operation of one or two values that lie as their sum does."""

    def part(geometry: Geometry) -> Slots:
        vectors = geometry.pixels * image.pixel_bytes // 64

        def slots(one: Operation, at: Addresses) -> list[Any]:
            a, b = (*(at[name] for name in one.reads), 0)[:2]
            return [a, b, at[one.makes], vectors, one.least, one.most]

        return slots

    windows = Windows(pixelwise(image), part)
    return Operation(
        "images_add", names, node.outputs[0], part(windows.geometry), [node], windows=windows
    )
