"""Images that are turned to have channels last, and back: what is between takes them as they are.

Exporters of frameworks whose images have channels last turn them around convolutions. Most other
operators do the same either way, with axes and constants turned instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx

from headrace.networks.as_rows import TO_IMAGES, TO_ROWS
from headrace.networks.graph import Graph, Node, TensorType
from headrace.networks.operators import MALFORMED
from headrace.networks.quantisation import named
from headrace.networks.without_moves import reading

# Of each element by itself, with numbers that are the same for all besides.
_EACH = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "DequantizeLinear", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not",
    "QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus",
    "Softsign", "Sqrt", "Tanh", "ThresholdedRelu",
)  # fmt: skip
# Of elements in the same place, or of what is spread over them.
_TOGETHER = ("Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum", "Where")
_REDUCED = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
_SAME_ORDER = ("Flatten", "Reshape", "Squeeze")


def without_turns(graph: Graph) -> Graph:
    """The graph with fewer of these transpositions; itself where there would not be fewer."""
    if not any(_perm(node) == TO_ROWS for node in graph.nodes):
        return graph
    found = _Turned(graph).graph()
    return found if _turns(found.nodes) < _turns(graph.nodes) else graph


def _turns(nodes: Iterable[Node]) -> int:
    return sum(node.op == "Transpose" for node in nodes)


def _perm(node: Node) -> Any:
    turns = node.op == "Transpose" and not node.domain and node.inputs and node.outputs
    return node.attribute("perm") if turns else None


def _axis(axis: int) -> int:
    """Where an axis of four is that has channels last, once they are second."""
    return TO_ROWS[axis % 4]


class _Turned:
    """Nodes as they come, and what there is with channels second of what has them last."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._images = graph, dict[str, str]()
        self._renamed, self._nodes = dict[str, str](), list[Node]()
        self._fixed = {name for node in graph.nodes for name in node.captured} | set(graph.outputs)

    def graph(self) -> Graph:
        """With all nodes that are needed."""
        for node in self._graph.nodes:
            node = reading(node, self._renamed)
            if _perm(node) == TO_ROWS:
                self._images[node.outputs[0]] = node.inputs[0]
            elif _perm(node) == TO_IMAGES and node.inputs[0] in self._images:
                if node.outputs[0] not in self._fixed:
                    self._renamed[node.outputs[0]] = self._images[node.inputs[0]]
                    continue
            elif not node.domain and self._taken(node):
                continue
            self._nodes.append(node)
        return self._graph.of(self._nodes)

    def _taken(self, node: Node) -> bool:
        """Whether nodes for images take the place of one for what has channels last."""
        if not any(name in self._images for name in node.inputs):
            return False
        maker = _MAKERS.get(node.op)
        try:
            made = None if maker is None else maker(self, node)
        except MALFORMED:
            return False
        if made is None:
            return False
        for x, y in zip(made.outputs, node.outputs, strict=True):
            if x == y:
                continue
            self._images[y] = x
            turn = onnx.helper.make_node("Transpose", [x], [y], y, perm=TO_ROWS)
            self._nodes += [Node(turn)]
        return True

    # --- what nodes are made of -------------------------------------------------------------------

    def _changed(self, node: Node, inputs: Sequence[str], **attributes: Any) -> Node:
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        proto.input[:] = list(inputs)
        kept = [one for one in proto.attribute if one.name not in attributes]
        del proto.attribute[:]
        proto.attribute.extend(kept)
        for name, value in attributes.items():
            proto.attribute.append(onnx.helper.make_attribute(name, value))
        return Node(proto, node.captured)

    def _add(self, node: Node, inputs: Sequence[str], **attributes: Any) -> Node | None:
        """The node for images, all of whose results have four axes."""
        types = [self._graph.types.get(name) for name in node.outputs]
        if any(of is None or of.shape is None or len(of.shape) != 4 for of in types):
            return None
        made = self._changed(node, inputs, **attributes)
        for i, of in enumerate(types):
            assert of is not None and of.shape is not None
            name = f"{node.outputs[i]}/headrace/first"
            made.proto.output[i] = name
            shape = tuple(of.shape[axis] for axis in TO_IMAGES)
            self._graph.types[name] = TensorType(of.elem_type, shape)
        self._nodes.append(made)
        return made

    def _image(self, name: str) -> str | None:
        """What a value or constant is with channels second; None: it would have to be turned."""
        if name in self._images:
            return self._images[name]
        of = self._graph.type(name)
        if of is None or of.shape is None or len(of.shape) > 4:
            return None
        if len(of.shape) == 0:
            return name
        whole = (1,) * (4 - len(of.shape)) + of.shape
        shape = tuple(whole[axis] for axis in TO_IMAGES)
        made = f"{name}/headrace/first"
        constants = self._graph.constants
        if name in constants:
            held = TensorType(of.elem_type, shape)
            constants.derive(
                made, held, [name],
                lambda: np.ascontiguousarray(
                    constants.array(name).reshape(whole).transpose(TO_IMAGES)
                ),
            )  # fmt: skip
            return made
        if len(of.shape) == 4 and of.shape[1:3] == (1, 1):
            if made not in self._graph.types:
                self._graph.types[made] = TensorType(of.elem_type, shape)
                sizes = self._numbers(shape)
                reshape = onnx.helper.make_node("Reshape", [name, sizes], [made], made)
                self._nodes.append(Node(reshape))
            return made
        return None

    def _numbers(self, values: Sequence[int]) -> str:
        return self._graph.constants.put(np.array(values, np.int64))

    def _held(self, name: str) -> list[int] | None:
        """Numbers of a constant; None: it is none."""
        constants = self._graph.constants
        if name not in constants or not constants.is_small(name):
            return None
        return [int(value) for value in constants.array(name).reshape(-1)]

    # --- operators --------------------------------------------------------------------------------

    def each(self, node: Node) -> Node | None:
        """All but the first input are single numbers."""
        x, *others = node.inputs
        sizes = [self._graph.type(name) for name in others if name]
        if x not in self._images:
            return None
        if any(of is None or of.shape not in ((), (1,)) for of in sizes):
            return None
        return self._add(node, [self._images[x], *others])

    def together(self, node: Node) -> Node | None:
        """Of values that are spread over each other."""
        found = [self._image(name) for name in node.inputs]
        return None if None in found else self._add(node, [name for name in found if name])

    def joined(self, node: Node) -> Node | None:
        """Concat of four axes."""
        found = [self._image(name) for name in node.inputs]
        if None in found or any(len(self._sizes(name)) != 4 for name in node.inputs):
            return None
        return self._add(node, [n for n in found if n], axis=_axis(node.attribute("axis")))

    def _sizes(self, name: str) -> tuple[int, ...]:
        of = self._graph.type(name)
        return () if of is None else of.shape or ()

    def split(self, node: Node) -> Node | None:
        """Split, along any axis."""
        x, *others = node.inputs
        if x not in self._images:
            return None
        axis = _axis(node.attribute("axis", 0))
        return self._add(node, [self._images[x], *others], axis=axis)

    def reduced(self, node: Node) -> Node | None:
        """Over some axes, which stay with one element, or over rows and columns at least."""
        x, given = node.inputs[0], named(node.inputs, 1)
        axes = self._held(given) if given else node.attribute("axes")
        if not axes or x not in self._images:
            return None
        turned = sorted(_axis(axis) for axis in axes)
        inputs = [self._images[x], *([self._numbers(turned)] if given else [])]
        more = {} if given else {"axes": turned}
        if node.attribute("keepdims", 1):
            return self._add(node, inputs, **more)
        if not {2, 3} <= set(turned):
            return None
        made = self._changed(node, inputs, **more)
        self._nodes.append(made)
        return made

    def padded(self, node: Node) -> Node | None:
        """Pad of all axes."""
        x, given, *others = [*node.inputs, ""][:4]
        pads = self._held(given) if given else None
        if pads is None or len(pads) != 8 or x not in self._images or named(node.inputs, 3):
            return None
        turned = [pads[axis + end] for end in (0, 4) for axis in TO_IMAGES]
        inputs = [self._images[x], self._numbers(turned), *[name for name in others if name]]
        return self._add(node, inputs)

    def same_order(self, node: Node) -> Node | None:
        """What makes other sizes of elements that lie in the same order."""
        x, of = self._images.get(node.inputs[0]), self._graph.types.get(node.outputs[0])
        shape = self._graph.shape(x) if x is not None else None
        if x is None or shape is None or of is None or of.shape is None:
            return None
        if (shape[2] * shape[3] != 1 and shape[1] != 1) or 0 in of.shape:
            return None
        sizes = self._numbers(of.shape)
        made = Node(onnx.helper.make_node("Reshape", [x, sizes], node.outputs, node.proto.name))
        self._nodes.append(made)
        return made


_MAKERS: dict[str, Callable[[_Turned, Node], Node | None]] = {
    **dict.fromkeys(_EACH, _Turned.each),
    **dict.fromkeys(_TOGETHER, _Turned.together),
    **dict.fromkeys(_REDUCED, _Turned.reduced),
    **dict.fromkeys(_SAME_ORDER, _Turned.same_order),
    "Concat": _Turned.joined,
    "Pad": _Turned.padded,
    "Split": _Turned.split,
}
