"""The largest set of values for which something holds, against looking at all again and again."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from headrace.networks.graph import Node
from headrace.networks.greatest import keep_those


@pytest.mark.parametrize("seed", range(20))
def test_it_is_what_is_left(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"v{i}" for i in range(40)]
    nodes = [
        Node(helper.make_node("Add", [names[j] for j in rng.integers(0, i, 2)], [names[i]]))
        for i in range(1, 40)
    ]
    makers = {node.outputs[0]: node for node in nodes}
    users = {name: [one for one in nodes if name in one.inputs] for name in names}
    never, alone = ({*rng.choice(names, 3)} for _ in range(2))

    def holds_in(found: set[str], name: str) -> bool:
        """In its place: what makes it reads these, or it is one that needs nothing; so do users."""
        reads = makers[name].inputs if name in makers else []
        used = all(found.issuperset(one.outputs) or one.outputs[0] in alone for one in users[name])
        return name not in never and used and (name in alone or all(n in found for n in reads))

    found, expected = set(names), set(names)
    keep_those(found, lambda name: holds_in(found, name), makers, users)
    while wrong := {name for name in expected if not holds_in(expected, name)}:
        expected -= wrong
    assert found == expected
