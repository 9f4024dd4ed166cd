"""DynamicLinear: products of activations that are quantised as they come with constant weights.

As onnxruntime's dynamic quantisation writes them: x is quantised by DynamicQuantizeLinear, and the
product of integers times both scales is added to a bias, by single operators or by fused ones.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from headrace.networks.graph import Node, TensorType
from headrace.networks.operation import BYTES
from headrace.networks.patterns.match import Matcher, new_node

OP = "DynamicLinear"
INT8, MOST = BYTES[1], 127  # of kernels' weights


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.DynamicLinear in place of a last product by scales, or of a fused operator."""
    made = _found(matcher, node)
    return made and (_in_two(matcher, *made) or made)


def _in_two(matcher: Matcher, node: Node) -> list[Node] | None:
    """Two products and their sum, where weights less zero points exceed -127..127; None: not so.

    One has what is within, the other what is left: mostly zeros, which sparse kernels leave out.
    """
    x, weights, scale, zero, bias = [*node.inputs, "", ""][:5]
    constants, y = matcher.graph.constants, node.outputs[0]
    shape = matcher.shape(y)
    if shape is None or any(one and one not in constants for one in (weights, zero)):
        return None
    of, given = constants.type(weights), constants.array(zero) if zero else np.zeros((), np.int8)
    if weights not in constants or of.elem_type not in BYTES or given.ndim > 1:
        return None

    def part(first: bool) -> np.ndarray:
        whole = constants.array(weights).astype(np.int16) - given.astype(np.int16)
        within = np.clip(whole, -MOST, MOST)
        return (within if first else whole - within).astype(np.int8)

    codes, zeros = constants.array(weights), given.astype(np.int16)
    if codes.ndim != 2 or not codes.size:
        return None
    ends = [end.astype(np.int16) - zeros for end in (codes.max(0), codes.min(0))]
    if not MOST < np.abs(ends).max() <= 2 * MOST:
        return None
    made, nodes = [], []
    for role in ("within", "rest"):
        name = f"{y}/headrace/{role} of weights"
        sources = [one for one in (weights, zero) if one]
        constants.derive(name, TensorType(INT8, of.shape), sources, partial(part, role == "within"))
        made.append(matcher.new_value(y, role, shape))
        more = ["", bias] if bias and role == "within" else []
        nodes.append(linear([x, name, scale, *more], made[-1]))
    return [*nodes, new_node("Add", made, y)]


def _found(matcher: Matcher, node: Node) -> list[Node] | None:
    if node.domain == "com.microsoft":
        return _fused(matcher, node)
    if node.op != "Mul" or node.domain:
        return None
    for product, factor in (node.inputs, node.inputs[::-1]):
        cast = matcher.maker(product, "Cast")
        integers = None if cast is None else matcher.maker(cast.inputs[0], "MatMulInteger")
        scales = matcher.maker(factor, "Mul")
        if cast is None or integers is None or scales is None or cast.attribute("to") != 1:
            continue
        codes, weights, zero, w_zero = [*integers.inputs, "", ""][:4]
        for x_scale, w_scale in (scales.inputs, scales.inputs[::-1]):
            x = quantised_from(matcher, codes, x_scale, zero)
            if x is not None and w_scale in matcher.graph.constants:
                return [linear([x, weights, w_scale, w_zero], node.outputs[0])]
    return None


def _fused(matcher: Matcher, node: Node) -> list[Node] | None:
    inputs = [*node.inputs, *[""] * 7]
    if node.op == "DynamicQuantizeMatMul":
        x, weights, scale, zero, bias = inputs[:5]
        return [linear([x, weights, scale, zero, bias], node.outputs[0])]
    if node.op == "MatMulIntegerToFloat":
        codes, weights, x_scale, scale, x_zero, zero, bias = inputs[:7]
        found = quantised_from(matcher, codes, x_scale, x_zero)
        if found is not None:
            return [linear([found, weights, scale, zero, bias], node.outputs[0])]
    return None


def quantised_from(matcher: Matcher, codes: str, scale: str, zero: str) -> str | None:
    """What DynamicQuantizeLinear made these three of."""
    maker = matcher.maker(codes, "DynamicQuantizeLinear")
    if maker is None or maker.outputs != [codes, scale, zero]:
        return None
    return maker.inputs[0]


def linear(inputs: list[str], output: str) -> Node:
    """A DynamicLinear of x, weights, scales, zero points and maybe a bias."""
    while inputs and not inputs[-1]:
        inputs = inputs[:-1]
    return new_node(OP, inputs + [""] * (4 - len(inputs)), output, "headrace")


# For the table in docs/onnx.md: which of them.
WHICH = {
    "DynamicQuantizeLinear, MatMulInteger, DynamicQuantizeMatMul, MatMulIntegerToFloat": (
        "the first two together; constant weights of 8 bits: what exceeds -127..127 once its zero "
        "point is taken away is a second product"
    ),
    "QAttention (com.microsoft)": "constant weights in -127..127 once their zero point is away",
}
