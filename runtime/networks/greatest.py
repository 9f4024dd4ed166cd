"""The largest set of values for which something holds that depends on those beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from headrace.networks.graph import Node


def keep_those(
    found: set[str],
    holds: Callable[[str], bool],
    makers: Mapping[str, Node],
    users: Mapping[str, Sequence[Node]],
) -> None:
    """Take values out of a set until it holds for all that are left.

    Args:
        found: is changed; `holds` looks at it, and at no value but those of nodes that make or read
            the one in question. What is there can only make it hold, what is not there cannot.
        makers, users: nodes by what they make, and read.
    """
    waiting = list(found)
    while waiting:
        name = waiting.pop()
        if name not in found or holds(name):
            continue
        found.discard(name)
        beside = [*users.get(name, ()), *((makers[name],) if name in makers else ())]
        for node in beside:
            waiting.extend(one for one in (*node.inputs, *node.outputs) if one in found)
