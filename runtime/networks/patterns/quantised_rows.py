"""Rows of a table of bytes that are dequantised, before they are taken or behind that.

The table stays as it is: as float32 it is four times as large.
"""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.quantisation import named


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """QuantisedRows in place of the last of Gather and DequantizeLinear."""
    if node.domain or node.op not in ("Gather", "DequantizeLinear"):
        return None
    inner = matcher.maker(node.inputs[0], "DequantizeLinear" if node.op == "Gather" else "Gather")
    if inner is None:
        return None
    gather, scaled = (node, inner) if node.op == "Gather" else (inner, node)
    if gather.attribute("axis", 0) not in (0, -2):
        return None
    inputs = [inner.inputs[0], gather.inputs[1], scaled.inputs[1], named(scaled.inputs, 2)]
    return [new_node("QuantisedRows", inputs, node.outputs[0], "headrace")]
