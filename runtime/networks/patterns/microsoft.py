"""Fused operators of com.microsoft (what onnxruntime's optimiser writes), taken apart again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from headrace.networks.graph import Node
from headrace.networks.patterns import dynamic, linear
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.quantisation import named

EPSILON = 1e-12  # what SkipLayerNormalization adds where nothing is said
MASKED = -10000.0  # what Attention adds to masked scores where nothing is said
ON_MASKS = ("Cast", "Reshape", "Less", "Where", "Equal", "ReduceSum", "Sum")  # the host's part


def expanded(matcher: Matcher, node: Node) -> list[Node] | None:
    """What an operator stands for, for those that have kernels of ours in parts."""
    make = _MAKERS.get(node.op) if node.domain == "com.microsoft" else None
    return None if make is None else make(matcher, node)


def _biased(matcher: Matcher, node: Node, x: str, bias: str) -> tuple[list[Node], str] | None:
    """x + bias, if x is a product with constant weights: nodes, and the value's name."""
    shape = matcher.shape(x)
    if shape is None:
        return None
    made = matcher.new_value(node.outputs[0], "biased", shape)
    product = linear.with_bias(matcher, x, bias, made)
    return None if product is None else ([product], made)


def _skip_layer_norm(matcher: Matcher, node: Node) -> list[Node] | None:
    x, skip, weight, bias, more = (named(node.inputs, i) for i in range(5))
    shape = matcher.shape(x)
    out = [*node.outputs, "", "", ""]
    if shape is None or len(shape) != 3 or out[1] or out[2]:
        return None
    # It may be the same for each of a batch.
    if matcher.shape(skip) not in (shape, (1, *shape[1:]), shape[1:]):
        return None
    nodes: list[Node] = []
    if more:
        found = _biased(matcher, node, x, more)
        if found is None:
            return None
        nodes, x = found
    total = out[3] or matcher.new_value(out[0], "sum", shape)
    given = [total, weight, *([bias] if bias else [])]
    epsilon = node.attribute("epsilon", EPSILON)
    return [
        *nodes,
        new_node("Add", [x, skip], total),
        new_node("LayerNormalization", given, out[0], axis=-1, epsilon=epsilon),
    ]


def _gelu(matcher: Matcher, node: Node) -> list[Node] | None:
    x, bias = named(node.inputs, 0), named(node.inputs, 1)
    nodes: list[Node] = []
    if bias:
        found = _biased(matcher, node, x, bias)
        if found is None:
            return None
        nodes, x = found
    form = "tanh" if node.op == "FastGelu" else "none"
    return [*nodes, new_node("Gelu", [x], node.outputs[0], approximate=form)]


def _attention(matcher: Matcher, node: Node) -> list[Node] | None:
    x, weights, bias, mask = (named(node.inputs, i) for i in range(4))
    if any(node.inputs[4:]) or not bias:
        return None  # with a past, or with more that is added to the scores
    return _with_projections(
        matcher, node, x, weights, mask,
        lambda made: new_node("Linear", [x, weights, bias], made, "headrace"),
    )  # fmt: skip


def _quantised_attention(matcher: Matcher, node: Node) -> list[Node] | None:
    codes, weights, bias, scale, w_scale, mask, zero, w_zero = (
        named(node.inputs, i) for i in range(8)
    )
    x = dynamic.quantised_from(matcher, codes, scale, zero)
    if x is None or any(node.inputs[8:]):
        return None
    inputs = [x, weights, w_scale, w_zero, bias]
    return _with_projections(
        matcher, node, x, weights, mask, lambda made: dynamic.linear(inputs, made)
    )


def _with_projections(
    matcher: Matcher, node: Node, x: str, weights: str, mask: str, project: Callable[[str], Node]
) -> list[Node] | None:
    shape, out = matcher.shape(x), matcher.shape(node.outputs[0])
    heads = node.attribute("num_heads")
    if shape is None or out is None or any(node.outputs[1:]) or len(shape) != 3:
        return None
    other = ("unidirectional", "do_rotary", "past_present_share_buffer")
    if any(node.attribute(name, 0) for name in other):
        return None
    batch, tokens, width = out
    if matcher.shape(weights) != (shape[2], 3 * width):
        return None
    like = node.outputs[0]
    nodes: list[Node] = []
    if mask:
        masked = _mask(matcher, node, mask, (batch, tokens))
        if masked is None:
            return None
        nodes, mask = masked
    projections = matcher.new_value(like, "projections", (batch, tokens, 3 * width))
    scale = node.attribute("scale", 0.0) or (width // heads) ** -0.5
    return [
        *nodes,
        project(projections),
        new_node(
            "Attention", [projections, projections, projections, mask], like, "headrace",
            heads=heads, scale=scale, zeros=0, columns=[0, width, 2 * width],
        ),
    ]  # fmt: skip


def _mask(
    matcher: Matcher, node: Node, mask: str, sizes: tuple[int, int]
) -> tuple[list[Node], str] | None:
    """What is added to scores, from ones and zeros of [batch, keys] or numbers of keys [batch]."""
    batch, keys = sizes
    like, shape = f"{node.outputs[0]}/mask", matcher.shape(mask)
    if matcher.graph.opsets.get("", 0) < 9:  # nodes on masks are of this set
        return None
    spread = (batch, 1, 1, keys)

    constant = matcher.new_constant
    there = matcher.new_value(like, "there", spread, onnx.TensorProto.BOOL)
    if shape == (batch, keys):
        whole = matcher.new_value(like, "whole", (batch, keys), onnx.TensorProto.BOOL)
        nodes = [
            new_node("Cast", [mask], whole, to=onnx.TensorProto.BOOL),
            new_node("Reshape", [whole, constant(np.array(spread))], there),
        ]
    elif shape == (batch,):
        counts = matcher.new_value(like, "counts", (batch, 1, 1, 1), onnx.TensorProto.INT32)
        places = np.arange(keys, dtype=np.int32).reshape(1, 1, 1, keys)
        nodes = [
            new_node("Reshape", [mask, constant(np.array([batch, 1, 1, 1]))], counts),
            new_node("Less", [constant(places), counts], there),
        ]
    else:
        return None
    masked = np.array(node.attribute("mask_filter_value", MASKED), np.float32)
    made = matcher.new_value(like, "added", spread)
    choice = [there, constant(np.array(0, np.float32)), constant(masked)]
    return [*nodes, new_node("Where", choice, made)], made


_MAKERS = {
    "Attention": _attention,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "Gelu": _gelu,
    "QAttention": _quantised_attention,
    "SkipLayerNormalization": _skip_layer_norm,
}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Attention, EmbedLayerNormalization, SkipLayerNormalization, BiasGelu, FastGelu "
    "(com.microsoft)": ("without a past, biases constant"),
}
