"""LayerNormalization as it was spelled before operator set 17, RMSNormalization before 23.

(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * weight + bias, over the last dimension, with no
bias, or with neither mean nor bias.
"""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """The operator in place of the sum with the bias, or of the product with the weight."""
    if node.domain or node.op not in ("Add", "Mul"):
        return None
    if node.op == "Mul":
        return _weighted(matcher, node, node.outputs[0], "")
    for name, bias in (node.inputs, node.inputs[::-1]):
        product = matcher.maker(name, "Mul")
        if product is None or bias not in matcher.graph.constants:
            continue
        made = _weighted(matcher, product, node.outputs[0], bias)
        if made is not None:
            return made
    return None


def _weighted(matcher: Matcher, product: Node, makes: str, bias: str) -> list[Node] | None:
    """Of a product with the weight, and a bias ("": none)."""
    for quotient, weight in (product.inputs, product.inputs[::-1]):
        if weight not in matcher.graph.constants:
            continue
        op, inner = "LayerNormalization", _normalised(matcher, quotient)
        if inner is None and not bias:
            op, inner = "RMSNormalization", _by_root_mean_square(matcher, quotient)
        if inner is None:
            continue
        x, epsilon = inner
        shape, given = matcher.shape(x), [weight, *([bias] if bias else [])]
        if not shape or any(matcher.shape(name) != shape[-1:] for name in given):
            continue
        return [new_node(op, [x, *given], makes, axis=-1, epsilon=epsilon)]
    return None


def _by_root_mean_square(matcher: Matcher, name: str) -> tuple[str, float] | None:
    """x and epsilon, where a value is x / sqrt(mean(x^2) + epsilon)."""
    node = matcher.maker(name, "Mul", "Div")
    for x, other in () if node is None else (node.inputs, node.inputs[::-1]):
        root = other
        if node is not None and node.op == "Mul":
            inverse = matcher.maker(other, "Reciprocal", "Div")
            if inverse is None:
                continue
            if inverse.op == "Div" and not matcher.is_scalar(inverse.inputs[0], 1.0):
                continue
            root = inverse.inputs[-1]
        elif node is not None and x != node.inputs[0]:
            continue
        found = _root(matcher, root)
        square = None if found is None else matcher.maker(found[0], "Pow", "Mul")
        if found is None or square is None or square.inputs[0] != x:
            continue
        if square.inputs[1] == x if square.op == "Mul" else matcher.is_scalar(square.inputs[1], 2):
            return x, found[1]
    return None


def _root(matcher: Matcher, name: str) -> tuple[str, float] | None:
    """y and epsilon, where a value is sqrt(mean(y) + epsilon)."""
    sqrt = matcher.maker(name, "Sqrt")
    add = None if sqrt is None else matcher.maker(sqrt.inputs[0], "Add")
    split = None if add is None else matcher.split(add)
    square = None if split is None else _mean_of(matcher, split[0])
    return None if split is None or square is None else (square, split[1])


def _normalised(matcher: Matcher, name: str) -> tuple[str, float] | None:
    """x and epsilon, where a value is (x - mean) / sqrt(variance + epsilon)."""
    quotient = matcher.maker(name, "Div")
    if quotient is None:
        return None
    apart, root = quotient.inputs
    difference = matcher.maker(apart, "Sub")
    found = _root(matcher, root)
    if difference is None or found is None:
        return None
    square, epsilon = found
    x, mean = difference.inputs
    if _mean_of(matcher, mean) != x:
        return None
    squared = matcher.maker(square, "Pow", "Mul")
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
