"""GELU as exporters spell it: x (1 + erf(x / sqrt(2))) / 2, the factors in any order."""

from __future__ import annotations

import math

from headrace.networks.graph import Node
from headrace.networks.patterns.match import CLOSE, Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """Gelu in place of a last product."""
    if node.op != "Mul" or node.domain:
        return None
    factor, values = _factors(matcher, node)
    if len(values) != 2 or not math.isclose(factor, 0.5, rel_tol=CLOSE):
        return None
    for x, other in (values, values[::-1]):
        if _is_one_and_erf(matcher, other, x):
            return [new_node("Gelu", [x], node.outputs[0])]
    return None


def _factors(matcher: Matcher, node: Node) -> tuple[float, list[str]]:
    """Constant factor and other factors of a product, through one more product or quotient."""
    factor, values = 1.0, []
    for name in node.inputs:
        value = matcher.scalar(name)
        inner = matcher.maker(name, "Mul", "Div")
        if value is not None:
            factor *= value
        elif inner is not None and inner.op == "Mul":
            for part in inner.inputs:
                more = matcher.scalar(part)
                if more is None:
                    values.append(part)
                else:
                    factor *= more
        elif inner is not None and matcher.scalar(inner.inputs[1]):
            factor /= matcher.scalar(inner.inputs[1]) or 1.0
            values.append(inner.inputs[0])
        else:
            values.append(name)
    return factor, values


def _is_one_and_erf(matcher: Matcher, name: str, x: str) -> bool:
    """Whether a value is 1 + erf(x / sqrt(2))."""
    add = matcher.maker(name, "Add")
    split = None if add is None else matcher.split(add)
    if split is None or not math.isclose(split[1], 1.0, rel_tol=CLOSE):
        return False
    error = matcher.maker(split[0], "Erf")
    scaled = None if error is None else matcher.maker(error.inputs[0], "Mul", "Div")
    inner = None if scaled is None else matcher.split(scaled)
    if scaled is None or inner is None or inner[0] != x:
        return False
    if scaled.op == "Div" and scaled.inputs[0] != x:
        return False
    root = math.sqrt(2) if scaled.op == "Div" else math.sqrt(0.5)
    return math.isclose(inner[1], root, rel_tol=CLOSE)
