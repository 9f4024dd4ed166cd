"""Linear: a product with constant weights, and the bias that is added to it."""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns import dynamic
from headrace.networks.patterns.match import Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """A product with a bias in place of a sum of a product and a constant row."""
    if node.op != "Add" or node.domain:
        return None
    for name, bias in (node.inputs, node.inputs[::-1]):
        shape = matcher.shape(node.outputs[0])
        if bias not in matcher.graph.constants or shape is None:
            continue
        if matcher.shape(bias) != shape[-1:] or matcher.shape(name) != shape:
            continue
        made = with_bias(matcher, name, bias, node.outputs[0])
        if made is not None:
            return [made]
    return None


def with_bias(matcher: Matcher, name: str, bias: str, output: str) -> Node | None:
    """A product that has no bias yet, with one; None: the value is no such product."""
    product = matcher.maker(name, "MatMul")
    if product is not None:
        return new_node("Linear", [*product.inputs, bias], output, "headrace")
    product = matcher.makers.get(name)
    if product is None or product.domain != "headrace" or product.op != dynamic.OP:
        return None
    if len(product.inputs) > 4:
        return None
    return dynamic.linear([*product.inputs, bias], output)
