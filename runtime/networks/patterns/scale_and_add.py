"""ScaleAndAdd: x + x s, of a residual path around a factor of each channel."""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.ScaleAndAdd in place of a sum."""
    if node.op != "Add" or node.domain:
        return None
    for x, product in (node.inputs, node.inputs[::-1]):
        made = matcher.maker(product, "Mul")
        if made is None or x not in made.inputs or made.inputs[0] == made.inputs[1]:
            continue
        (scale,) = (name for name in made.inputs if name != x)
        shape = matcher.shape(x)
        if shape is None or len(shape) != 4 or scale in matcher.graph.constants:
            continue
        if matcher.shape(scale) in ((shape[0], shape[1], 1, 1), (1, shape[1], 1, 1)):
            return [new_node("ScaleAndAdd", [x, scale], node.outputs[0], "headrace")]
    return None
