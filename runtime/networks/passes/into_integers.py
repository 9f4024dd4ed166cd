"""DequantizeLinear, an operator, QuantizeLinear: one operator of integers, of a graph.

What is made are operators that ONNX or onnxruntime has (QLinearConv, QGemm, QLinearAdd,
QLinearGlobalAveragePool, Clip and Reshape of bytes), and only those that kernels of ours compute.
Sums of products are exact then, where floats round each; all else is the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from headrace.networks.graph import Graph, Node, TensorType, node_of
from headrace.networks.operators import operation_for
from headrace.networks.quantisation import (
    added,
    elem_type,
    named,
    quantisation,
)

_MICROSOFT = "com.microsoft"
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_MOST_INT32 = 2**31 - 1


def into_integers(graph: Graph) -> Graph | None:
    """The graph with operators of integers; None: there is nothing to be made."""
    found = _Rewriting(graph).graph
    return found if len(found.nodes) < len(graph.nodes) else None


class _Rewriting:
    def __init__(self, graph: Graph) -> None:
        self.made = {name: node for node in graph.nodes for name in node.outputs}
        self.users = graph.users()
        self.outputs = set(graph.outputs)
        self.old = graph
        opsets = {**graph.opsets, _MICROSOFT: graph.opsets.get(_MICROSOFT, 1)}
        self.graph = Graph(
            [], graph.constants, graph.inputs, graph.outputs, opsets, graph.ir_version,
            dict(graph.types), graph.sparse,
        )  # fmt: skip
        taken: dict[int, list[Node]] = {}
        gone: set[int] = set()
        for node in graph.nodes:
            made = None if id(node) in gone else self._integer(node)
            if made is not None:
                nodes, last = made
                taken[id(last)] = nodes
                gone.update(id(one) for one in self._between(node, last))
        for node in graph.nodes:
            if id(node) in taken:
                self.graph.nodes += taken[id(node)]
            elif id(node) not in gone:
                self.graph.nodes.append(node)
        self._without_unused()

    # ---- what stands around a node ---------------------------------------------------------------

    def _dequantised(self, name: str) -> list[str] | None:
        """Value, scale and zero point that a value is dequantised from."""
        node = self.made.get(name)
        if node is None or node.op != "DequantizeLinear":
            return None
        return [node.inputs[0], node.inputs[1], named(node.inputs, 2)]

    def _only_user(self, name: str) -> Node | None:
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def _quantiser(self, node: Node) -> tuple[Node, list[Node]] | None:
        """The QuantizeLinear that alone reads what a node makes, and bounds in between."""
        bounds = []
        last = self._only_user(node.outputs[0])
        while last is not None and last.op in ("Relu", "Clip") and not last.domain:
            bounds.append(last)
            last = self._only_user(last.outputs[0])
        if last is None or last.op != "QuantizeLinear":
            return None
        return last, bounds

    def _between(self, first: Node, last: Node) -> list[Node]:
        found, node = [first], first
        while node is not last:
            following = self._only_user(node.outputs[0])
            assert following is not None
            node = following
            found.append(node)
        return found

    # ---- nodes ---------------------------------------------------------------------------------

    def _integer(self, node: Node) -> tuple[list[Node], Node] | None:
        """Nodes of integers in place of one with its neighbours, and the last of these."""
        maker = _MAKERS.get(node.op)
        if maker is None or node.domain:
            return None
        after = self._quantiser(node)
        if after is None:
            if node.op not in ("Gemm", "MatMul"):
                return None
            last, bounds, to = node, [], ["", ""]
        else:
            last, bounds = after
            to = [last.inputs[1], named(last.inputs, 2)]
        y = last.outputs[0]
        clip = self._byte_bounds(bounds, to, y)
        if clip is None:
            return None
        inner = f"{y} unbounded" if clip else y
        proto = maker(self, node, to, inner)
        if proto is None:
            return None
        if clip:
            self.graph.types[inner] = self.graph.types[y]
        protos = [proto, *([helper.make_node("Clip", [inner, *clip], [y])] if clip else ())]
        nodes = [node_of(one) for one in protos]
        if any(operation_for(self.graph, one) is None for one in nodes):
            return None
        return nodes, last

    def _byte_bounds(self, bounds: list[Node], to: list[str], y: str) -> list[str] | None:
        """Names of the least and the most byte; none: all are possible; None: not known."""
        if not bounds:
            return []
        kind = elem_type(self.graph, y)
        of = quantisation(self.graph, *to, kind)
        if of is None:
            return None
        least, most = -np.inf, np.inf
        for node in bounds:
            pair = _bounds(self.graph, node)
            if pair is None:
                return None
            least, most = max(least, pair[0]), min(most, pair[1])
        if not least <= most:
            return None
        scale = np.float32(of.scale)
        whole = [np.rint(np.float32(v) / scale) + of.zero for v in (least, most)]
        low, high = (int(np.clip(v, 0, 255)) for v in whole)
        if (low, high) == (0, 255):
            return []
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        names = [f"{y} least", f"{y} most"]
        for name, value in zip(names, (low, high), strict=True):
            self._constant(name, np.array(value - added(kind), dtype))
        return names

    def _constant(self, name: str, value: np.ndarray) -> str:
        tensor = numpy_helper.from_array(value, name)
        self.graph.constants.computed[name] = tensor
        self.graph.types[name] = TensorType(tensor.data_type, value.shape)
        return name

    def bias(self, name: str, x_scale: str, w_scale: str, y: str) -> str | None:
        """An int32 constant of a bias in float32, in units of the products; None: there is none."""
        constants = self.graph.constants
        if not all(one in constants for one in (x_scale, w_scale)):
            return None
        unit = np.float64(constants.array(x_scale).reshape(-1)) * constants.array(w_scale)
        unit = unit.reshape(-1)
        source = self._dequantised(name)
        if source is not None and all(not one or one in constants for one in source):
            given = constants.array(source[1]).reshape(-1)
            whole = constants.array(source[0])
            zero = constants.array(source[2]) if source[2] else np.zeros(1)
            fits = given.size in (1, unit.size) and np.allclose(given, unit, rtol=1e-5, atol=0)
            if fits and whole.dtype == np.int32 and not zero.any():
                return source[0]
            value = (np.float64(whole) - zero) * given
        elif name in constants:
            value = np.float64(constants.array(name))
        else:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = np.rint(value.reshape(-1) / unit)
        if not (np.abs(whole) <= _MOST_INT32).all():
            return None
        return self._constant(f"{y} bias", whole.astype(np.int32))

    def _without_unused(self) -> None:
        wanted = set(self.graph.outputs)
        kept = []
        for node in reversed(self.graph.nodes):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.reads)
        self.graph.nodes = kept[::-1]

    def operands(self, node: Node, at: tuple[int, ...]) -> list[str] | None:
        """What inputs are dequantised from, one behind the other."""
        found: list[str] = []
        for i in at:
            source = self._dequantised(named(node.inputs, i))
            if source is None:
                return None
            found += source
        return found


def _bounds(graph: Graph, node: Node) -> tuple[float, float] | None:
    if node.op == "Relu":
        return 0.0, np.inf
    found = []
    for i, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        value = float(node.attribute(name, default))
        given = named(node.inputs, i)
        if given:
            if given not in graph.constants:
                return None
            value = float(graph.constants.array(given).reshape(-1)[0])
        found.append(value)
    return found[0], found[1]


Maker = Callable[[_Rewriting, Node, list[str], str], Any]


def _conv(rewriting: _Rewriting, node: Node, to: list[str], y: str) -> Any:
    of = rewriting.operands(node, (0, 1))
    if of is None:
        return None
    inputs = [*of, *to]
    if named(node.inputs, 2):
        bias = rewriting.bias(node.inputs[2], of[1], of[4], y)
        if bias is None:
            return None
        inputs.append(bias)
    proto = helper.make_node("QLinearConv", inputs, [y], name=node.proto.name)
    proto.attribute.extend(node.proto.attribute)
    return proto


def _gemm(rewriting: _Rewriting, node: Node, to: list[str], y: str) -> Any:
    of = rewriting.operands(node, (0, 1))
    if of is None or node.attribute("beta", 1.0) != 1.0:
        return None
    bias = ""
    if named(node.inputs, 2):
        found = rewriting.bias(node.inputs[2], of[1], of[4], y)
        if found is None:
            return None
        bias = found
    inputs = [*of, bias, *to]
    while not inputs[-1]:
        inputs.pop()
    given = {one.name: helper.get_attribute_value(one) for one in node.proto.attribute}
    kept = {name: value for name, value in given.items() if name != "beta"}
    return helper.make_node(
        "QGemm", inputs, [y], name=node.proto.name, domain=_MICROSOFT, **kept
    )


def _add(rewriting: _Rewriting, node: Node, to: list[str], y: str) -> Any:
    of = rewriting.operands(node, (0, 1))
    if of is None:
        return None
    return helper.make_node(
        "QLinearAdd", [*of, *to], [y], name=node.proto.name, domain=_MICROSOFT
    )


def _mean(rewriting: _Rewriting, node: Node, to: list[str], y: str) -> Any:
    of = rewriting.operands(node, (0,))
    if of is None:
        return None
    return helper.make_node(
        "QLinearGlobalAveragePool", [*of, *to], [y], name=node.proto.name, domain=_MICROSOFT,
        channels_last=0,
    )  # fmt: skip


def _view(rewriting: _Rewriting, node: Node, to: list[str], y: str) -> Any:
    """The same bytes, if they mean the same on both sides."""
    of, graph = rewriting.operands(node, (0,)), rewriting.graph
    if of is None or elem_type(graph, of[0]) != elem_type(graph, y):
        return None
    kind = elem_type(graph, y)
    before, after = quantisation(graph, *of[1:], kind), quantisation(graph, *to, kind)
    if before is None or before != after:
        return None
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[0], proto.output[0] = of[0], y
    return proto


_MAKERS: dict[str, Maker] = {
    "Conv": _conv, "Gemm": _gemm, "MatMul": _gemm, "Add": _add, "GlobalAveragePool": _mean,
    **dict.fromkeys(_VIEWS, _view),
}  # fmt: skip
