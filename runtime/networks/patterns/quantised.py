"""DequantizeLinear, an operator, QuantizeLinear: one operator of integers.

What is made are operators that ONNX or onnxruntime has: QLinearConv, QGemm, QLinearAdd,
QLinearGlobalAveragePool, and Clip and Reshape of bytes. Sums of products are exact then, where
floats round each; all else is the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from headrace.networks.graph import Graph, Node, TensorType
from headrace.networks.operators.bounds import bounds_of
from headrace.networks.operators.quantised_images import has_integers
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.quantisation import added, elem_type, named, quantisation

_MICROSOFT = "com.microsoft"
# What stays as bytes, and tables of words: as float32 they are four times as large.
_AS_BYTES = ("QuantizeLinear", "DequantizeLinear", "Gather")
FLOAT = onnx.TensorProto.FLOAT
_MOST_INT32 = 2**31 - 1


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """Nodes of integers in place of QuantizeLinear and what it reads, or of a last product."""
    if node.domain:
        return None
    if node.op == "Add" and (biased := _biased(matcher, node)) is not None:
        return [biased]
    if node.op in ("Gemm", "MatMul"):
        if any(user.op == "QuantizeLinear" for user in _users(matcher, node.outputs[0])):
            return None
        return _made(matcher, node, ("", ""), node.outputs[0], [])
    if node.op != "QuantizeLinear":
        return None
    bounds: list[Node] = []
    before = _alone(matcher, node.inputs[0])
    while before is not None and before.op in ("Relu", "Clip") and not before.domain:
        bounds.append(before)
        before = _alone(matcher, before.inputs[0])
    if before is None or before.domain:
        return None
    to = (node.inputs[1], named(node.inputs, 2))
    return _made(matcher, before, to, node.outputs[0], bounds)


def with_constants(matcher: Matcher, node: Node) -> list[Node] | None:
    """An operator between those of integers that takes what is dequantised as constant numbers."""
    if node.domain or node.op in _AS_BYTES:
        return None
    if not any(matcher.maker(name, "DequantizeLinear") for name in node.inputs):
        return None
    if not has_integers(matcher.graph):
        return None
    inputs = [_numbers(matcher, name) or name for name in node.inputs]
    if inputs == node.inputs:
        return None
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[:] = inputs
    return [Node(proto)]


def _numbers(matcher: Matcher, name: str) -> str | None:
    """The name of a constant that DequantizeLinear makes of constants; None: it is none."""
    source, constants = matcher.maker(name, "DequantizeLinear"), matcher.graph.constants
    if source is None or any(one and one not in constants for one in source.inputs):
        return None
    shape, sizes = matcher.shape(name), matcher.shape(source.inputs[1])
    if shape is None or sizes is None or elem_type(matcher.graph, name) != FLOAT:
        return None
    count = math.prod(sizes)
    axis = source.attribute("axis", 1) % max(1, len(shape))
    if source.attribute("block_size", 0) or (count > 1 and sizes != shape[axis : axis + 1]):
        return None
    given = [*source.inputs, ""][:3]
    along = [1] * len(shape)
    if count > 1:
        along[axis] = -1

    def make() -> np.ndarray:
        codes, scale, zero = (constants.array(one) if one else None for one in given)
        assert codes is not None and scale is not None
        whole = codes.astype(np.int32)
        if zero is not None:
            whole -= zero.astype(np.int32).reshape(along)
        found: np.ndarray = whole.astype(np.float32) * scale.reshape(along)
        return found

    made = f"{name}/headrace/numbers"
    sources = [one for one in given if one]
    constants.derive(made, TensorType(FLOAT, shape), sources, make)
    return made


def _floats(matcher: Matcher, name: str) -> str | None:
    """The name of a constant, as it stands or dequantised; None: it is none."""
    return name if name in matcher.graph.constants else _numbers(matcher, name)


def _users(matcher: Matcher, name: str) -> list[Node]:
    return matcher.users.get(name, [])


def _alone(matcher: Matcher, name: str) -> Node | None:
    """What makes a value that nobody else reads."""
    only = len(_users(matcher, name)) == 1 and name not in matcher.graph.outputs
    return matcher.makers.get(name) if only else None


def _made(
    matcher: Matcher, node: Node, to: tuple[str, str], y: str, bounds: list[Node]
) -> list[Node] | None:
    maker = _MAKERS.get(node.op)
    clip = _byte_bounds(matcher.graph, bounds, to, y)
    if maker is None or clip is None:
        return None
    inner = y
    if clip:
        inner = f"{y}/headrace/unbounded"
        matcher.graph.types[inner] = matcher.graph.types[y]
    made = maker(matcher, node, to, inner)
    if made is None:
        return None
    return [made, new_node("Clip", [inner, *clip], y)] if clip else [made]


def _byte_bounds(graph: Graph, bounds: list[Node], to: tuple[str, str], y: str) -> list[str] | None:
    """Names of the least and the most byte; none: all are possible; None: not known."""
    if not bounds:
        return []
    kind = elem_type(graph, y)
    of = quantisation(graph, *to, kind)
    pairs = [bounds_of(graph, node) for node in bounds]
    known = [pair for pair in pairs if pair is not None]
    if of is None or len(known) < len(pairs):
        return None
    least, most = max(pair[0] for pair in known), min(pair[1] for pair in known)
    if not least <= most:
        return None
    whole = (np.rint(np.float32(v) / np.float32(of.scale)) + of.zero for v in (least, most))
    low, high = (int(np.clip(v, 0, 255)) for v in whole)
    if (low, high) == (0, 255):
        return []
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    ends = (("least", low), ("most", high))
    return [_constant(graph, y, role, np.array(v - added(kind), dtype)) for role, v in ends]


def _constant(graph: Graph, like: str, role: str, value: np.ndarray) -> str:
    name = f"{like}/headrace/{role}"
    tensor = numpy_helper.from_array(value, name)
    graph.constants.computed[name] = tensor
    graph.types[name] = TensorType(tensor.data_type, value.shape)
    return name


def _operands(matcher: Matcher, node: Node, count: int, axis: int = 0) -> list[str] | None:
    """Values, scales and zero points that the first inputs are dequantised from.

    Where there are several scales, they are those of an axis.
    """
    found: list[str] = []
    for name in node.inputs[:count]:
        source = matcher.maker(name, "DequantizeLinear")
        if source is None or source.attribute("block_size", 0):
            return None
        sizes = matcher.shape(source.inputs[1])
        rank = len(matcher.shape(source.inputs[0]) or ())
        if sizes is None or not rank:
            return None
        if math.prod(sizes) > 1 and source.attribute("axis", 1) % rank != axis:
            return None
        found += [source.inputs[0], source.inputs[1], named(source.inputs, 2)]
    return found


def _bias(matcher: Matcher, name: str, x_scale: str, w_scale: str, y: str) -> str | None:
    """An int32 constant of a float32 bias, in units of the products; None: it is no constant."""
    constants = matcher.graph.constants
    if x_scale not in constants or w_scale not in constants:
        return None
    unit = (np.float64(constants.array(x_scale)) * constants.array(w_scale)).reshape(-1)
    source = matcher.maker(name, "DequantizeLinear")
    if source is not None and all(not one or one in constants for one in source.inputs):
        given = constants.array(source.inputs[1]).reshape(-1)
        codes = constants.array(source.inputs[0])
        zero = named(source.inputs, 2)
        offset = constants.array(zero) if zero else np.zeros(1, np.int32)
        same = given.size in (1, unit.size) and np.allclose(given, unit, rtol=1e-5, atol=0)
        if same and codes.dtype == np.int32 and not offset.any():
            return source.inputs[0]
        value = (np.float64(codes) - offset) * given
    elif name in constants:
        value = np.float64(constants.array(name))
    else:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.rint(value.reshape(-1) / unit)
    if not (np.abs(whole) <= _MOST_INT32).all():
        return None
    return _constant(matcher.graph, y, "bias", whole.astype(np.int32))


def _copied(node: Node, op: str, inputs: list[str], y: str, domain: str, *less: str) -> Node:
    """An operator with the attributes of another, but for some."""
    made = new_node(op, inputs, y, domain)
    made.proto.attribute.extend(one for one in node.proto.attribute if one.name not in less)
    return made


def _conv(matcher: Matcher, node: Node, to: tuple[str, str], y: str) -> Node | None:
    of = _operands(matcher, node, 2)
    if of is None:
        return None
    inputs = [*of, *to]
    if named(node.inputs, 2):
        bias = _bias(matcher, node.inputs[2], of[1], of[4], y)
        if bias is None:
            return None
        inputs.append(bias)
    return _copied(node, "QLinearConv", inputs, y, "")


def _gemm(matcher: Matcher, node: Node, to: tuple[str, str], y: str) -> Node | None:
    of = _operands(matcher, node, 2, 0 if node.attribute("transB", 0) else 1)
    if of is None or node.attribute("beta", 1.0) != 1.0:
        return None
    bias: str | None = ""
    if named(node.inputs, 2):
        bias = _bias(matcher, node.inputs[2], of[1], of[4], y)
        made = f"{y}/headrace/bias"
        if bias == made and not to[0]:  # what is rounded would show in float32
            floats = _floats(matcher, node.inputs[2])
            return None if floats is None else _with_floats(matcher, node, of, floats, y)
    if bias is None:
        return None
    inputs = [*of, bias, *to]
    while not inputs[-1]:
        inputs.pop()
    return _copied(node, "QGemm", inputs, y, _MICROSOFT, "beta")


def _biased(matcher: Matcher, node: Node) -> Node | None:
    """A product to float32 with what is added to each row, which comes behind its rounding."""
    y = node.outputs[0]
    for name, bias in (node.inputs, node.inputs[::-1]):
        product = matcher.maker(name, "MatMul")
        floats = None if product is None else _floats(matcher, bias)
        if product is None or floats is None:
            continue
        of = _operands(matcher, product, 2, 1)
        if of is not None and matcher.shape(name) == matcher.shape(y):
            return _with_floats(matcher, product, of, floats, y)
    return None


def _with_floats(matcher: Matcher, node: Node, of: list[str], bias: str, y: str) -> Node | None:
    """A product that adds a float32 bias of its columns; None: the bias is another."""
    shape = matcher.shape(y)
    if shape is None or matcher.shape(bias) != shape[-1:]:
        return None
    return _copied(node, "QGemm", [*of, bias], y, "headrace", "beta")


def _add(matcher: Matcher, node: Node, to: tuple[str, str], y: str) -> Node | None:
    of = _operands(matcher, node, 2)
    return None if of is None else new_node("QLinearAdd", [*of, *to], y, _MICROSOFT)


def _mean(matcher: Matcher, node: Node, to: tuple[str, str], y: str) -> Node | None:
    of = _operands(matcher, node, 1)
    if of is None or (node.op == "ReduceMean" and not _is_of_pixels(node)):
        return None
    inputs = [*of, *to]
    return new_node("QLinearGlobalAveragePool", inputs, y, _MICROSOFT, channels_last=0)


def _is_of_pixels(node: Node) -> bool:
    """Whether a mean is that of an image's pixels, and makes an image."""
    return bool(node.attribute("axes") == [2, 3] and node.attribute("keepdims", 1) == 1)


def _view(matcher: Matcher, node: Node, to: tuple[str, str], y: str) -> Node | None:
    """The same bytes, if they mean the same on both sides."""
    of, graph = _operands(matcher, node, 1), matcher.graph
    if of is None or elem_type(graph, of[0]) != elem_type(graph, y):
        return None
    kind = elem_type(graph, y)
    before, after = quantisation(graph, of[1], of[2], kind), quantisation(graph, *to, kind)
    if before is None or before != after:
        return None
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[0], proto.output[0] = of[0], y
    return Node(proto)


_MAKERS: dict[str, Callable[[Matcher, Node, tuple[str, str], str], Any]] = {
    "Conv": _conv, "Gemm": _gemm, "MatMul": _gemm, "Add": _add,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _mean),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"), _view),
}  # fmt: skip
