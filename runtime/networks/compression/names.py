"""Names of values in a model: how often each is read, and others that nothing has yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from headrace.loaders.onnx_model import subgraphs
from headrace.networks.graph import node_of


def reads(model: Any) -> Counter[str]:
    """How often values are read: by nodes, by graphs in nodes' attributes, and as outputs."""
    found = Counter(one.name for one in model.graph.output)
    for node in model.graph.node:
        found.update(node_of(node).reads)
    return found


class NewNames:
    """Gives names that a model does not have, inner graphs included: two values of one are none.

    Some exporters name what they make as we would: `fc1_weight`, `x_quantized`.
    """

    def __init__(self, model: Any) -> None:
        self._taken = set(_names(model.graph))

    def like(self, name: str) -> str:
        """This name, or a longer one if there is one of it already."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _names(graph: Any) -> Iterator[str]:
    for one in (*graph.input, *graph.output, *graph.initializer):
        yield one.name
    yield from (one.values.name for one in graph.sparse_initializer)
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in subgraphs(node):
            yield from _names(inner)
