"""Fused operators of com.microsoft (what onnxruntime's optimiser writes), taken apart again."""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node

EPSILON = 1e-12  # what SkipLayerNormalization adds where nothing is said


def expanded(matcher: Matcher, node: Node) -> list[Node] | None:
    """What an operator stands for, for those that have kernels of ours in parts."""
    make = _MAKERS.get(node.op) if node.domain == "com.microsoft" else None
    return None if make is None else make(matcher, node)


def _skip_layer_norm(matcher: Matcher, node: Node) -> list[Node] | None:
    inputs = [*node.inputs, "", ""]
    x, skip, weight, bias, more = inputs[:5]
    shape = matcher.shape(x)
    out = [*node.outputs, "", "", ""]
    if shape is None or len(shape) != 3 or matcher.shape(skip) != shape or out[1] or out[2]:
        return None
    if more:  # a bias of what comes before
        return None
    total = out[3] or matcher.new_value(out[0], "sum", shape)
    given = [total, weight, *([bias] if bias else [])]
    epsilon = node.attribute("epsilon", EPSILON)
    return [
        new_node("Add", [x, skip], total),
        new_node("LayerNormalization", given, out[0], axis=-1, epsilon=epsilon),
    ]


def _gelu(matcher: Matcher, node: Node) -> list[Node] | None:
    return [new_node("Gelu", node.inputs[:1], node.outputs[0])]


_MAKERS = {"SkipLayerNormalization": _skip_layer_norm, "Gelu": _gelu}
