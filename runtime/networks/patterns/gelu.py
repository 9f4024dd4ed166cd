"""GELU as exporters spell it, the factors in any order.

x (1 + erf(x / sqrt(2))) / 2, or x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
"""

from __future__ import annotations

import math

from headrace.networks.graph import Node
from headrace.networks.patterns.match import CLOSE, Matcher, new_node

_FACTOR = math.sqrt(2 / math.pi)
_TANH = {1: _FACTOR, 3: _FACTOR * 0.044715}  # factors of powers of x
MOST_NODES = 8  # of a polynomial


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """Gelu in place of a last product."""
    if node.op != "Mul" or node.domain:
        return None
    factor, values = _factors(matcher, node)
    if len(values) != 2 or not math.isclose(factor, 0.5, rel_tol=CLOSE):
        return None
    for x, other in (values, values[::-1]):
        form = _form(matcher, other, x)
        if form is not None:
            return [new_node("Gelu", [x], node.outputs[0], approximate=form)]
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


def _form(matcher: Matcher, name: str, x: str) -> str | None:
    """`approximate` of Gelu, where a value is 1 + erf or tanh of what that has; None: it is not."""
    add = matcher.maker(name, "Add")
    split = None if add is None else matcher.split(add)
    if split is None or not math.isclose(split[1], 1.0, rel_tol=CLOSE):
        return None
    curve = matcher.maker(split[0], "Erf", "Tanh")
    if curve is None:
        return None
    wanted, form = ({1: math.sqrt(0.5)}, "none") if curve.op == "Erf" else (_TANH, "tanh")
    found = _polynomial(matcher, curve.inputs[0], x, MOST_NODES)
    if found is None or found.keys() != wanted.keys():
        return None
    close = all(math.isclose(found[of], c, rel_tol=2 * CLOSE) for of, c in wanted.items())
    return form if close else None


def _polynomial(matcher: Matcher, name: str, x: str, most: int) -> dict[int, float] | None:
    """The factor of each power of x in a value; None: it is no polynomial of so few nodes."""
    if name == x:
        return {1: 1.0}
    value = matcher.scalar(name)
    if value is not None:
        return {0: value}
    node = matcher.maker(name, "Mul", "Add", "Div", "Pow")
    if node is None or most == 0:
        return None
    if node.op == "Pow":
        base = _polynomial(matcher, node.inputs[0], x, most - 1)
        power = matcher.scalar(node.inputs[1])
        if base is None or power not in (2.0, 3.0):
            return None
        found = base
        for _ in range(int(power) - 1):
            found = _product(found, base)
        return found
    a, b = (_polynomial(matcher, one, x, most - 1) for one in node.inputs)
    if a is None or b is None:
        return None
    if node.op == "Add":
        return {of: a.get(of, 0.0) + b.get(of, 0.0) for of in {*a, *b}}
    if node.op == "Mul":
        return _product(a, b)
    return {of: c / b[0] for of, c in a.items()} if b.keys() == {0} and b[0] else None


def _product(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for of, c in a.items():
        for also, d in b.items():
            found[of + also] = found.get(of + also, 0.0) + c * d
    return found
