"""What patterns ask of a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from headrace.networks.graph import Graph, Node, TensorType

CLOSE = 1e-6  # relatively: constants as files round them


class Matcher:
    """Makers of a graph's values, and its constants.

    Attributes:
        graph: of which it is.
        makers: the node that makes a value.
        users: nodes that read it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.nodes for name in node.outputs if name}
        self.users = graph.users()

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node that makes a value, if it is one of these operators of ONNX."""
        node = self.makers.get(name)
        return node if node is not None and not node.domain and node.op in ops else None

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element; None: it is none, or adds dimensions."""
        constants = self.graph.constants
        if name not in constants or not constants.is_small(name):
            return None
        shape = constants.type(name).shape or ()
        if math.prod(shape) != 1 or (len(shape) > 1 and self._widens(name, len(shape))):
            return None
        return float(constants.array(name).reshape(-1)[0])

    def _widens(self, name: str, rank: int) -> bool:
        """Whether a node that reads a constant makes more dimensions of what it reads besides."""
        return any(
            rank > max((len(self.shape(n) or ()) for n in node.inputs if n != name), default=0)
            for node in self.users.get(name, ())
        )

    def is_scalar(self, name: str, value: float) -> bool:
        """Whether a value is a constant of this value."""
        found = self.scalar(name)
        return found is not None and math.isclose(found, value, rel_tol=CLOSE)

    def split(self, node: Node) -> tuple[str, float] | None:
        """Of an operator with two inputs, one of them a constant of one element: the other, and it.

        None: it is not so.
        """
        if len(node.inputs) != 2:
            return None
        for i in (1, 0):
            value = self.scalar(node.inputs[i])
            if value is not None:
                return node.inputs[1 - i], value
        return None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a value or constant; None: not known."""
        if name in self.graph.constants:
            return self.graph.constants.type(name).shape
        return self.graph.shape(name)

    def new_value(
        self, like: str, role: str, shape: tuple[int, ...], elem_type: int = onnx.TensorProto.FLOAT
    ) -> str:
        """The name of a value that the file does not have, made on the way to `like`."""
        name = f"{like}/headrace/{role}"
        self.graph.types[name] = TensorType(elem_type, shape)
        return name

    def new_constant(self, array: np.ndarray) -> str:
        """The name of a constant that the file does not have: that of its content."""
        return self.graph.constants.put(array)

    def joined(self, like: str, role: str, names: Sequence[str]) -> str:
        """The name of a constant: others of a type beside each other, on the way to `like`."""
        constants = self.graph.constants
        types = [constants.type(name) for name in names]
        shapes = [of.shape or () for of in types]
        of = TensorType(types[0].elem_type, (*shapes[0][:-1], sum(shape[-1] for shape in shapes)))
        made = f"{like}/headrace/{role}"
        constants.derive(
            made, of, names, lambda: np.concatenate([constants.array(n) for n in names], axis=-1)
        )
        return made


def new_node(op: str, inputs: Sequence[str], output: str, domain: str = "", **given: Any) -> Node:
    """A node that the file does not have."""
    proto = onnx.helper.make_node(op, list(inputs), [output], output, domain=domain, **given)
    return Node(proto, ours_alone=True)
