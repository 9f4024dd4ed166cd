"""Norms of images: InstanceNormalization, GroupNormalization and the response norm of ConvNeXt V2.

headrace.ResponseNorm takes x, weight and bias of channels, and makes x + x n weight + bias, where n
is a channel's length over all pixels by that of all channels in the mean (and `epsilon`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from headrace.kernels.moments import BLOCK
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Image, Operation, channel_axis, image_of


def _instance_norm(graph: Graph, node: Node) -> Operation | None:
    return _norm(graph, node, "moments_normalise", each=1)


def _group_norm(graph: Graph, node: Node) -> Operation | None:
    x, groups = node.inputs[0], node.attribute("num_groups", 0)
    of = image_of(graph, x)
    if of is None or groups < 1 or of.channels % groups or node.attribute("stash_type", 1) != 1:
        return None
    return _norm(graph, node, "moments_normalise", each=of.channels // groups)


def _response_norm(graph: Graph, node: Node) -> Operation | None:
    return _norm(graph, node, "moments_respond", each=1)


def _norm(graph: Graph, node: Node, kernel: str, each: int) -> Operation | None:
    x, y = node.inputs[0], node.outputs[0]
    of, made, shape = image_of(graph, x), image_of(graph, y), graph.shape(x) or ()
    if of is None or of != made or x in graph.constants or len(shape) < 3:
        return None
    in_rows = channel_axis(graph, x) == len(shape) - 1
    if in_rows and node.domain != "headrace":
        return None
    of_file = not (node.ours_alone or node.instead_of)
    grouped = of_file and graph.opsets.get("", 21) < 21
    weights = [_of_channels(graph, name, of, each if grouped else 1) for name in node.inputs[1:3]]
    weight, bias = weights
    if weight is None or bias is None:
        return None
    epsilon = float(node.attribute("epsilon", 1e-5))
    images, pixels = shape[0], math.prod(shape[1:]) // of.channels
    blocks = images * -(-pixels // BLOCK)
    parts, factors = f"{y}/headrace/moments", f"{y}/headrace/factors"

    def of_blocks(one: Operation, at: Addresses) -> list[Any]:
        step = one.step(one.reads[0], of)
        return [at[one.reads[0]], at[one.makes], images, pixels, of.padded // 16, step]

    def of_images(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[parts], at.own["weight"], at.own["bias"], at[factors], images, pixels, of.channels,
            of.padded, each, epsilon,
        ]  # fmt: skip

    def scaled(one: Operation, at: Addresses) -> list[Any]:
        x, adds = one.reads[0], one.adds
        return [
            at[x], at[one.makes], at[factors], 0 if adds is None else at[adds], images, pixels,
            of.padded // 16, one.step(x, of), one.step(one.makes, of),
            0 if adds is None else one.step(adds, of), one.least, one.most, *one.finish.slots(),
        ]  # fmt: skip

    first = Operation("images_moments", [x], parts, of_blocks, [node])
    first.image = Image(2 * blocks, 1, 1, of.padded)
    found = Operation(kernel, [parts], factors, of_images, [], {"weight": weight, "bias": bias})
    found.image = Image(3 * images, 1, 1, of.padded)
    first.also = [found, Operation("images_scale", [x, factors], y, scaled, [])]
    return first


def _of_channels(graph: Graph, name: str, of: Image, each: int) -> np.ndarray | None:
    """A constant for each channel, or for so many together, padded with zeros."""
    if name not in graph.constants or graph.constants.type(name).elem_type != 1:
        return None
    given = graph.constants.array(name).reshape(-1).repeat(each)
    if given.size != of.channels:
        return None
    found = np.zeros(of.padded, np.float32)
    found[: of.channels] = given
    return found


OPERATORS = {
    "InstanceNormalization": _instance_norm, "GroupNormalization": _group_norm,
    "headrace.ResponseNorm": _response_norm,
}  # fmt: skip
# For the table in docs/onnx.md: which of them.
WHICH = {
    "InstanceNormalization, GroupNormalization": (
        "of images, of one dimension as well, with constant weights; also as reshapes around "
        "InstanceNormalization, and ConvNeXt V2's response norm as exporters spell it"
    ),
}
