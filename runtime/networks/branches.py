"""`If` nodes whose condition is known: the nodes of the branch that is taken stand in their place.

A condition may be computed from shapes, which plans know, or from inputs of a single number, as the
rate of a sound. Those do not change shapes but decide what runs: so plans are kept for what was
decided, not for each number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from headrace.loaders.onnx_model import subgraphs
from headrace.networks.graph import Graph, Node, node_of
from headrace.networks.host import HostRegion

MOST_NUMBERS = 256  # of inputs, whose decisions are remembered
_NOT_DECIDED = ("RandomNormal", "RandomUniform", "Multinomial", "Bernoulli")


def taken_branch(graph: Graph, node: Node) -> list[Node] | None:
    """Nodes of the branch that an `If` takes; None: it is none, or its condition is not known."""
    if node.op != "If" or node.domain or not node.inputs or not node.outputs:
        return None
    if node.inputs[0] not in graph.constants:
        return None
    condition = _truth(graph.constants.array(node.inputs[0]))
    if condition is None:  # which onnxruntime refuses
        return None
    branch = node.attribute("then_branch" if condition else "else_branch")
    if branch is None or branch.sparse_initializer:
        return None
    if len(branch.output) != len(node.outputs):  # which onnxruntime refuses
        return None
    # A name of its own for all that is made inside: other branches may use the same ones.
    own = [name for one in branch.node for name in one.output if name]
    own += [one.name for one in branch.initializer]
    names = {name: f"{node.outputs[0]}/{name}" for name in own}
    found = [_constant(one, names[one.name]) for one in branch.initializer]
    for one in branch.node:
        found.append(node_of(_renamed(one, names)))
    for inside, outside in zip(branch.output, node.outputs, strict=True):
        if outside:
            source = names.get(inside.name, inside.name)
            found.append(node_of(_made("Identity", [source], outside)))
    return found


def _truth(value: Any) -> bool | None:
    """Of a condition; None: it is none."""
    if not isinstance(value, np.ndarray) or value.dtype != np.bool_ or value.size != 1:
        return None
    return bool(value.reshape(-1)[0])


def _constant(tensor: Any, name: str) -> Node:
    proto = _made("Constant", [], name)
    proto.attribute.add(name="value", type=4).t.CopyFrom(tensor)
    return Node(proto)


def _made(op: str, inputs: Sequence[str], output: str) -> Any:
    import onnx

    return onnx.helper.make_node(op, inputs, [output])


def _renamed(proto: Any, names: Mapping[str, str]) -> Any:
    """A copy of a node that reads and makes values under these names."""
    found = type(proto)()
    found.CopyFrom(proto)
    for values in (found.input, found.output):
        values[:] = [names.get(name, name) for name in values]
    for inner in subgraphs(found):
        _rename_read(inner, names)
    return found


def _rename_read(graph: Any, names: Mapping[str, str]) -> None:
    """Rename what a graph inside reads of those around it."""
    own = {one.name for one in (*graph.input, *graph.initializer)}
    own |= {one.values.name for one in graph.sparse_initializer}
    own.update(name for one in graph.node for name in one.output)
    outer = {name: to for name, to in names.items() if name not in own}
    for one in graph.node:
        one.input[:] = [outer.get(name, name) for name in one.input]
        for inner in subgraphs(one):
            _rename_read(inner, outer)
    for output in graph.output:
        output.name = outer.get(output.name, output.name)


class Decisions:
    """Conditions of a graph's `If` nodes that inputs of a single whole number or bool decide.

    Args:
        graph: of the network.
        numbers: names of its inputs that are such ones.

    Attributes:
        inputs: names of those that decide.
    """

    def __init__(self, graph: Graph, numbers: Sequence[str]) -> None:
        self._graph = graph
        makers = {name: node for node in graph.nodes for name in node.outputs if name}
        ifs = [node for node in graph.nodes if node.op == "If" and not node.domain]
        conditions = {node.inputs[0] for node in ifs if node.inputs}
        behind = {name: list(_behind(graph, makers, numbers, name)) for name in conditions}
        self._conditions = sorted(name for name, nodes in behind.items() if None not in nodes)
        wanted = {id(node) for name in self._conditions for node in behind[name]}
        self._nodes = [node for node in graph.nodes if id(node) in wanted]
        read = {name for node in self._nodes for name in node.reads} | set(self._conditions)
        self.inputs = [name for name in numbers if name in read]
        self._known: dict[bytes, tuple[tuple[str, bool], ...]] = {}

    def of(self, values: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
        """Conditions and what they are for these inputs; none: not all that decide are arrays."""
        if not self.inputs:
            return ()
        given = [one for n in self.inputs if isinstance(one := values.get(n), np.ndarray)]
        if len(given) < len(self.inputs):
            return ()
        key = b"".join(one.tobytes() for one in given)
        found = self._known.get(key)
        if found is None:
            found = self._decided(values)
            if len(self._known) < MOST_NUMBERS:
                self._known[key] = found
        return found

    def _decided(self, values: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
        made = [name for name in self._conditions if name not in self.inputs]
        found = {name: values[name] for name in self.inputs}
        if made:
            found |= HostRegion(self._graph, self._nodes, made, 1).run(values)
        known = ((name, _truth(found[name])) for name in self._conditions)
        return tuple((name, value) for name, value in known if value is not None)


def _behind(
    graph: Graph, makers: Mapping[str, Node], numbers: Sequence[str], name: str
) -> Iterator[Node | None]:
    """Nodes that a value is computed by; None among them: not from numbers and constants alone."""
    look, seen = [name], set()
    while look:
        one = look.pop()
        if one in seen or one in numbers or one in graph.constants:
            continue
        seen.add(one)
        node = makers.get(one)
        if node is None or node.captured or node.op.startswith(_NOT_DECIDED):
            yield None
            return
        yield node
        look.extend(node.reads)
