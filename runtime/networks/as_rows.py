"""Values of four dimensions that lie as rows of the last one, where others of four are images.

Those of recurrent layers are so, [steps, directions, sequences, channels]: models squeeze or turn
them. So are those [images, rows, columns, channels] that stand between rows and images, where
nothing moves.
"""

from __future__ import annotations

from headrace.networks.graph import Graph, Node

_RESHAPES = ("Squeeze", "Unsqueeze", "Reshape", "Flatten")
_MOVES = (*_RESHAPES, "Transpose", "Identity")  # that take what lies anyhow
TO_IMAGES, TO_ROWS = [0, 3, 1, 2], [0, 2, 3, 1]  # perm of Transpose


def as_rows(graph: Graph) -> frozenset[str]:
    """Names of these values; of none whose users take images."""
    from headrace.networks.operators import OPERATORS, key_of

    users = graph.users()
    made = {
        node.outputs[0]
        for node in graph.nodes
        if key_of(node) in ("LSTM", "GRU") and node.outputs and node.outputs[0]
    }
    recurrent = {
        name
        for name in made
        if all(key_of(one) in _MOVES or key_of(one) not in OPERATORS for one in users.get(name, []))
    }
    between = {
        node.outputs[0]
        for node in graph.nodes
        if not node.domain and node.inputs and node.outputs and len(_shape(graph, node, 1)) == 4
        if _gives_rows(graph, node) and _all_take(graph, users.get(node.outputs[0], []))
    }
    return frozenset(recurrent | between.difference(graph.outputs))


def _shape(graph: Graph, node: Node, end: int) -> tuple[int, ...]:
    return graph.shape((node.outputs if end else node.inputs)[0]) or ()


def _keeps_channels(graph: Graph, node: Node) -> bool:
    before, after = _shape(graph, node, 0), _shape(graph, node, 1)
    return node.op in _RESHAPES and before[-1:] == after[-1:] and 3 in (len(before), len(after))


def _gives_rows(graph: Graph, node: Node) -> bool:
    if node.op == "Transpose":
        return node.attribute("perm") == TO_ROWS and len(_shape(graph, node, 0)) == 4
    return _keeps_channels(graph, node)


def _all_take(graph: Graph, users: list[Node]) -> bool:
    return bool(users) and all(
        not one.domain
        and (
            one.attribute("perm") == TO_IMAGES
            if one.op == "Transpose"
            else _keeps_channels(graph, one)
        )
        for one in users
    )
