"""Values of four dimensions that lie as rows of the last one, where others of four are images.

Those of recurrent layers are so, [steps, directions, sequences, channels]: models squeeze or turn
them.
"""

from __future__ import annotations

from headrace.networks.graph import Graph

_MOVES = (
    "Squeeze",
    "Unsqueeze",
    "Reshape",
    "Flatten",
    "Transpose",
    "Identity",
)  # that take what lies anyhow


def as_rows(graph: Graph) -> frozenset[str]:
    """Names of these values; of none whose users take images."""
    from headrace.networks.operators import OPERATORS, key_of

    users = graph.users()
    made = {
        node.outputs[0]
        for node in graph.nodes
        if key_of(node) in ("LSTM", "GRU") and node.outputs and node.outputs[0]
    }
    return frozenset(
        name
        for name in made
        if all(key_of(one) in _MOVES or key_of(one) not in OPERATORS for one in users.get(name, []))
    )
