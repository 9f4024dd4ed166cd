"""Values of four dimensions that lie as rows of the last one, where others of four are images.

Those of recurrent layers are so, [steps, directions, sequences, channels]: models squeeze or turn
them. So are those [images, rows, columns, channels] that are made of turned images, or of rows, and
what is computed of their channels (ConvNeXt: LayerNormalization and two products between turns).
"""

from __future__ import annotations

from collections.abc import Collection

from headrace.networks.graph import Graph, Node
from headrace.networks.greatest import keep_those

_RESHAPES = ("Squeeze", "Unsqueeze", "Reshape", "Flatten")
_RUNS = "headrace.TakeRuns"
_MOVES = (*_RESHAPES, "Transpose", "Identity", _RUNS)  # that take what lies anyhow
TO_IMAGES, TO_ROWS = [0, 3, 1, 2], [0, 2, 3, 1]  # perm of Transpose
FLOAT = 1  # of TensorProto
# That make rows of the rows that they read first, whatever else they read.
_OF_ONE = (
    "LayerNormalization", "MatMul", "headrace.Linear", "Gelu", "Sigmoid", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Relu", "Clip", "headrace.Silu", "headrace.HardSwish", "Pow", "Sqrt",
    "Tanh", "Abs", "Erf", "Slice", "Split", "Pad", "Identity",
    "headrace.ResponseNorm",
)  # fmt: skip
_OF_SEVERAL = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat")


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
    return frozenset(recurrent | _between(graph, recurrent))


def _between(graph: Graph, recurrent: Collection[str]) -> set[str]:
    """Those between images, or rows, and images, or rows."""
    from headrace.networks.operators import key_of
    from headrace.networks.operators.mean import averages_rows

    users = graph.users()
    makers = {
        name: node
        for node in graph.nodes
        for name in node.outputs
        if node.inputs and len(graph.shape(name) or ()) == 4
        if graph.types[name].elem_type == FLOAT
    }
    found = set(makers.keys() - graph.outputs)

    def computes(node: Node) -> bool:
        """Whether it makes rows of rows."""
        several = key_of(node) in _OF_SEVERAL
        if not several and key_of(node) not in _OF_ONE:
            return False
        read = [n for n in (node.inputs if several else node.inputs[:1]) if n]
        rows = {name for name in (*read, *node.outputs) if name not in graph.constants}
        return not rows.isdisjoint(read) and found >= rows - {""}

    def moves_runs(node: Node) -> bool:
        """Whether it makes rows of rows, with other channels."""
        if key_of(node) != _RUNS:
            return False
        ends = [name for name in (node.inputs[0], node.outputs[0]) if name not in recurrent]
        return all(len(graph.shape(name) or ()) != 4 or name in found for name in ends)

    def taken(node: Node) -> bool:
        if _gives_images(node) or _keeps_channels(graph, node):
            return True
        return computes(node) or moves_runs(node) or averages_rows(graph, node)

    def gives_rows(node: Node) -> bool:
        return _gives_rows(graph, node)

    def holds(name: str) -> bool:
        made = any(gives(makers[name]) for gives in (gives_rows, computes, moves_runs))
        return made and bool(users.get(name)) and all(taken(one) for one in users[name])

    keep_those(found, holds, makers, users)
    return found


def _shape(graph: Graph, node: Node, end: int) -> tuple[int, ...]:
    return graph.shape((node.outputs if end else node.inputs)[0]) or ()


def _keeps_channels(graph: Graph, node: Node) -> bool:
    if node.domain or node.op not in _RESHAPES:
        return False
    before, after = _shape(graph, node, 0), _shape(graph, node, 1)
    return before[-1:] == after[-1:] and 3 in (len(before), len(after))


def _gives_rows(graph: Graph, node: Node) -> bool:
    if node.op == "Transpose" and not node.domain:
        return node.attribute("perm") == TO_ROWS and len(_shape(graph, node, 0)) == 4
    return _keeps_channels(graph, node)


def _gives_images(node: Node) -> bool:
    return node.op == "Transpose" and not node.domain and node.attribute("perm") == TO_IMAGES
