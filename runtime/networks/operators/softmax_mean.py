"""headrace.SoftmaxMean: see the pattern of this name."""

from __future__ import annotations

from typing import Any

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import PADDED, Addresses, Operation, Weight, image_of


def _softmax_mean(graph: Graph, node: Node) -> Operation | None:
    x, weights = node.inputs
    groups = node.attribute("groups")
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    if read is None or written is None or x not in graph.channels_first:
        return None
    bins = read.channels // groups
    if bins % PADDED:
        return None

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[x], at[one.makes], at.own["weights"], read.images * read.pixels, groups,
            bins // PADDED, one.step(x, read), one.step(one.makes, written),
        ]  # fmt: skip

    key = graph.constants.identity(weights)
    weight = Weight(
        4 * bins,
        lambda: graph.constants.array(weights).reshape(-1),
        None if key is None else ("bins", key),
    )
    return Operation(
        "images_softmax_mean", [x], node.outputs[0], slots, [node], {"weights": weight},
    )  # fmt: skip


OPERATORS = {"headrace.SoftmaxMean": _softmax_mean}
