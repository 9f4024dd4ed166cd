"""LayerNormalization and RMSNormalization of the last dimension."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, image_of, in_rows


def _layer_norm(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    of, rank = image_of(graph, x), len(graph.shape(x) or ())
    if of is None or x in graph.constants or any(node.outputs[1:]) or not in_rows(graph, x):
        return None
    if node.attribute("axis", -1) % rank != rank - 1 or node.attribute("stash_type", 1) != 1:
        return None
    weights = {}
    for name, source in zip(("weight", "bias"), (*node.inputs[1:], ""), strict=False):
        weights[name] = np.zeros(of.padded, np.float32)
        if source:
            if source not in graph.constants or graph.constants.type(source).elem_type != 1:
                return None
            given = graph.constants.array(source)
            if given.size not in (1, of.channels):
                return None
            weights[name][: of.channels] = given.reshape(-1)
    epsilon = float(node.attribute("epsilon", 1e-5))

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[x], at.own["weight"], at.own["bias"], at[one.makes], of.images, of.channels,
            of.padded, epsilon, int(node.op == "RMSNormalization"),
        ]  # fmt: skip

    return Operation("layer_norm_f32", [x], node.outputs[0], slots, [node], dict(weights))


OPERATORS = dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm)
# For the table in docs/onnx.md: which of them.
WHICH = {
    "LayerNormalization, RMSNormalization": "of the last dimension, with constant weights",
}
