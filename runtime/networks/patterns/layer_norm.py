"""LayerNormalization as it was spelled before operator set 17.

(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * weight + bias, over the last dimension.
"""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """LayerNormalization in place of the sum with the bias."""
    if node.op != "Add" or node.domain:
        return None
    constants = matcher.graph.constants
    for name, bias in (node.inputs, node.inputs[::-1]):
        product = matcher.maker(name, "Mul")
        if product is None or bias not in constants:
            continue
        for quotient, weight in (product.inputs, product.inputs[::-1]):
            inner = _normalised(matcher, quotient)
            if inner is None or weight not in constants:
                continue
            x, epsilon = inner
            shape = matcher.shape(x)
            if not shape or any(matcher.shape(n) != shape[-1:] for n in (weight, bias)):
                continue
            return [
                new_node(
                    "LayerNormalization", [x, weight, bias], node.outputs[0], axis=-1,
                    epsilon=epsilon,
                )
            ]  # fmt: skip
    return None


def _normalised(matcher: Matcher, name: str) -> tuple[str, float] | None:
    """x and epsilon, where a value is (x - mean) / sqrt(variance + epsilon)."""
    quotient = matcher.maker(name, "Div")
    if quotient is None:
        return None
    apart, root = quotient.inputs
    difference = matcher.maker(apart, "Sub")
    sqrt = matcher.maker(root, "Sqrt")
    add = None if sqrt is None else matcher.maker(sqrt.inputs[0], "Add")
    split = None if add is None else matcher.split(add)
    if difference is None or split is None:
        return None
    variance, epsilon = split
    x, mean = difference.inputs
    if _mean_of(matcher, mean) != x:
        return None
    square = _mean_of(matcher, variance)
    squared = None if square is None else matcher.maker(square, "Pow", "Mul")
    if squared is None or not _is_same(matcher, squared.inputs[0], apart):
        return None
    if squared.op == "Pow":
        squares = matcher.is_scalar(squared.inputs[1], 2.0)
    else:
        squares = _is_same(matcher, squared.inputs[1], apart)
    return (x, epsilon) if squares else None


def _is_same(matcher: Matcher, name: str, other: str) -> bool:
    """Whether two values are one, or the same difference, which some exporters compute twice."""
    if name == other:
        return True
    a, b = matcher.maker(name, "Sub"), matcher.maker(other, "Sub")
    return a is not None and b is not None and a.inputs == b.inputs


def _mean_of(matcher: Matcher, name: str) -> str | None:
    """What a value is the mean of, over its last dimension, which stays."""
    node = matcher.maker(name, "ReduceMean")
    if node is None or not node.attribute("keepdims", 1):
        return None
    axes = node.attribute("axes")
    if len(node.inputs) > 1 and node.inputs[1] in matcher.graph.constants:
        axes = matcher.graph.constants.array(node.inputs[1]).tolist()
    rank = len(matcher.shape(node.inputs[0]) or ())
    if not rank or axes is None or [axis % rank for axis in axes] != [rank - 1]:
        return None
    return node.inputs[0]
