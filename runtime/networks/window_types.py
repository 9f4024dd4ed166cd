"""Where onnx's inference of shapes says something else than onnxruntime makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from headrace.networks.graph import Graph, Node, TensorType
from headrace.networks.quantisation import named

_POOLS = ("MaxPool", "AveragePool", "LpPool")
_WINDOWS = (*_POOLS, "Conv", "QLinearConv", "ConvInteger")


def inferable(graph: Graph, node: Node) -> Any | None:
    """A node as the inference of shapes takes it; None: it would say something else.

    Where nothing is to be padded, onnx counts `pads` that are given nevertheless. Of pools that pad
    to the same size it forgets dilations, or onnxruntime does, and of ConvTranspose that does, what
    else is said of the size. Of sizes that are less than what is read it gives half a shape. Where
    windows are larger than all there is, and sizes are rounded up, onnxruntime makes nothing.
    """
    if node.attribute("ceil_mode", 0) and reaches_beyond(graph, node):
        return None
    auto = node.attribute("auto_pad", b"NOTSET")
    if node.domain or (auto == b"NOTSET" and node.op != "ConvTranspose"):
        return node.proto
    if node.op == "ConvTranspose":
        own, read = (
            node.attribute("output_shape", []),
            (graph.shape(named(node.inputs, 0)) or ())[2:],
        )
        less = any(made < size for made, size in zip(own, read, strict=False))
        odd = less or (auto != b"NOTSET" and any((*own, *node.attribute("output_padding", []))))
        return None if odd else node.proto
    if node.op not in _WINDOWS:
        return node.proto
    if auto == b"VALID" and node.attribute("pads") is not None:
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        kept = [one for one in node.proto.attribute if one.name != "pads"]
        del proto.attribute[:]
        proto.attribute.extend(kept)
        return proto
    dilated = set(node.attribute("dilations", [1])) != {1}
    return None if auto != b"VALID" and dilated and node.op in _POOLS else node.proto


def reaches_beyond(graph: Graph, node: Node) -> bool:
    """Whether a pool has a window larger than all that it reads, with pads."""
    if node.domain or node.op not in _POOLS:
        return False
    window, read = (
        node.attribute("kernel_shape", []),
        (graph.shape(named(node.inputs, 0)) or ())[2:],
    )
    rank = len(window)
    apart = node.attribute("dilations", [1] * rank)
    pads = node.attribute("pads", [0] * 2 * rank)
    return any(
        (taps - 1) * step + 1 > size + before + behind
        for taps, step, size, before, behind in zip(
            window, apart, read, pads[:rank], pads[rank:], strict=False
        )
    )


def resized(graph: Graph, node: Node, made: TensorType) -> TensorType:
    """The type of what Resize and Upsample make by constant scales, as onnxruntime has it.

    It multiplies in float32, onnx in float64: of 40 x 0.7 the one makes 28 and the other 27.
    """
    shape, scales = graph.shape(node.inputs[0]), np.array(node.attribute("scales", []))
    name = named(node.inputs, 1 if len(node.inputs) == 2 else 2)
    if name in graph.constants:
        scales = graph.constants.array(name)
    if shape is None or made.shape is None or not np.isfinite(scales).all():
        return made
    axes = node.attribute("axes") or range(len(shape))
    sizes = list(made.shape)
    for axis, scale in zip(axes, scales, strict=False):
        sizes[axis] = int(np.float32(scale) * np.float32(shape[axis]))
    return replace(made, shape=tuple(sizes))
