"""EmbedLayerNormalization (com.microsoft) taken apart: rows of tables, their sum and its norm."""

from __future__ import annotations

import numpy as np
import onnx

from headrace.networks.graph import Node, TensorType
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.patterns.microsoft import EPSILON
from headrace.networks.quantisation import named


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """What it stands for, the norm last; of constant tables, with one place for each token."""
    if (node.domain, node.op) != ("com.microsoft", "EmbedLayerNormalization"):
        return None
    ids, segments, words, positions, kinds, weight, bias, mask = (
        named(node.inputs, i) for i in range(8)
    )
    shape = matcher.shape(node.outputs[0])
    out = [*node.outputs, "", ""]
    if shape is None or len(shape) != 3 or any(node.inputs[8:]) or bool(segments) != bool(kinds):
        return None
    nodes: list[Node] = []
    if out[1] and (out[1] in matcher.users or out[1] in matcher.graph.outputs):
        if not mask:
            return None
        nodes += _counts(matcher, node, mask, out[1])
    places = _places(matcher, positions, shape[1])
    if places is None:
        return None
    taken = matcher.new_value(out[0], "words", shape)
    total = out[2] or matcher.new_value(out[0], "sum", shape)
    placed = matcher.new_value(out[0], "placed", shape) if segments else total
    nodes += [
        new_node("Rows", [words, ids], taken, "headrace"),
        new_node("Add", [taken, places], placed),
    ]
    if segments:
        kind = matcher.new_value(out[0], "kinds", shape)
        nodes += [
            new_node("Rows", [kinds, segments], kind, "headrace"),
            new_node("Add", [placed, kind], total),
        ]
    epsilon = node.attribute("epsilon", EPSILON)
    norm = new_node("LayerNormalization", [total, weight, bias], out[0], axis=-1, epsilon=epsilon)
    return [*nodes, norm]


def _places(matcher: Matcher, table: str, tokens: int) -> str | None:
    """The name of a constant: the first rows of a table of positions."""
    constants, shape = matcher.graph.constants, matcher.shape(table)
    if table not in constants or shape is None or len(shape) != 2 or shape[0] < tokens:
        return None
    made = f"{table}/headrace/{tokens}"
    of = TensorType(constants.type(table).elem_type, (tokens, shape[1]))
    constants.derive(made, of, [table], lambda: constants.array(table)[:tokens])
    return made


def _counts(matcher: Matcher, node: Node, mask: str, made: str) -> list[Node]:
    """Of each text, how many elements of the mask are 1: the host's part."""
    shape = matcher.shape(mask)
    assert shape is not None
    ones = matcher.new_value(node.outputs[0], "ones", shape, onnx.TensorProto.BOOL)
    each = matcher.new_value(node.outputs[0], "each", shape, onnx.TensorProto.INT32)
    nodes = [
        new_node("Equal", [mask, matcher.new_constant(np.array(1, np.int32))], ones),
        new_node("Cast", [ones], each, to=onnx.TensorProto.INT32),
    ]
    if matcher.graph.opsets.get("", 13) < 13:
        return [*nodes, new_node("ReduceSum", [each], made, axes=[1], keepdims=0)]
    axes = matcher.new_constant(np.array([1]))
    return [*nodes, new_node("ReduceSum", [each, axes], made, keepdims=0)]
