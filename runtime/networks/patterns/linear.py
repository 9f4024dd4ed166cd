"""Linear: a product with constant weights, and the bias that is added to it."""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.Linear in place of a sum of MatMul and a constant row."""
    if node.op != "Add" or node.domain:
        return None
    for name, bias in (node.inputs, node.inputs[::-1]):
        product = matcher.maker(name, "MatMul")
        if product is None or bias not in matcher.graph.constants:
            continue
        shape = matcher.shape(node.outputs[0])
        if shape is None or matcher.shape(bias) != shape[-1:]:
            continue
        if matcher.shape(name) == shape:
            return [new_node("Linear", [*product.inputs, bias], node.outputs[0], "headrace")]
    return None
