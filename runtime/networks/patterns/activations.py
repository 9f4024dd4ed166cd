"""SiLU and HardSwish as exporters spell them: x sigmoid(x), x clip(x + 3, 0, 6) / 6."""

from __future__ import annotations

import math

from headrace.networks.graph import Graph, Node
from headrace.networks.patterns.match import CLOSE, Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.Silu or HardSwish in place of a last product or quotient."""
    if node.domain or node.op not in ("Mul", "Div"):
        return None
    if node.op == "Mul" and (gated := _gated(matcher, node)) is not None:
        return [gated]
    split = matcher.split(node)
    if split is None or (node.op == "Div" and split[0] != node.inputs[0]):
        return None
    factor = 1 / split[1] if node.op == "Div" and split[1] else split[1]
    product = matcher.maker(split[0], "Mul")
    if product is None:
        return None
    for x, gate in (product.inputs, product.inputs[::-1]):
        if _is_relu6(matcher, gate, x):
            if not math.isclose(factor, 1 / 6, rel_tol=CLOSE):
                return None
            return [_hard_swish(x, node.outputs[0], 1 / 6, 0.5)]
    return None


def with_hard_swish(graph: Graph) -> Graph:
    """The graph with one node for each HardSwish that is several."""
    matcher = Matcher(graph)
    made = [(node, found(matcher, node)) for node in graph.nodes]
    return graph.of([one[0] if one and one[0].op == "HardSwish" else node for node, one in made])


def _gated(matcher: Matcher, node: Node) -> Node | None:
    for x, gate in (node.inputs, node.inputs[::-1]):
        made = matcher.maker(gate, "Sigmoid", "HardSigmoid", "Mul", "Div")
        if made is None:
            continue
        if made.inputs[0] == x and made.op == "Sigmoid":
            return new_node("Silu", [x], node.outputs[0], "headrace")
        if made.inputs[0] == x and made.op == "HardSigmoid":
            alpha, beta = made.attribute("alpha", 0.2), made.attribute("beta", 0.5)
            return _hard_swish(x, node.outputs[0], alpha, beta)
        split = matcher.split(made)
        if split is None or not _is_relu6(matcher, split[0], x):
            continue
        factor = split[1] if made.op == "Mul" else 1 / (split[1] or math.inf)
        if math.isclose(factor, 1 / 6, rel_tol=CLOSE) and made.inputs[0] == split[0]:
            return _hard_swish(x, node.outputs[0], 1 / 6, 0.5)
    return None


def _hard_swish(x: str, y: str, alpha: float, beta: float) -> Node:
    return new_node("HardSwish", [x], y, "headrace", alpha=alpha, beta=beta)


def _is_relu6(matcher: Matcher, name: str, x: str) -> bool:
    """Whether a value is x + 3 between 0 and 6."""
    clip = matcher.maker(name, "Clip")
    if clip is None:
        return False
    bounds = [clip.attribute("min"), clip.attribute("max")]
    for i, one in enumerate(clip.inputs[1:3]):
        bounds[i] = matcher.scalar(one) if one else bounds[i]
    added = matcher.maker(clip.inputs[0], "Add")
    split = None if added is None else matcher.split(added)
    return bounds == [0.0, 6.0] and split == (x, 3.0)
