"""Nodes over which onnxruntime would end the process: it takes their values to be well made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from headrace.errors import UnsupportedError
from headrace.loaders.onnx_model import subgraphs
from headrace.networks.graph import Graph, Node
from headrace.networks.quantisation import named

_MOST_SAMPLES = 1 << 12  # of a bin along one axis, in RoiAlign


def check_values(graph: Graph, node: Node) -> None:
    """Look at attributes and shapes of a node, and of those in its graphs.

    Raises:
        UnsupportedError: it, or onnx's inference of shapes, would end the process.
    """
    check = _CHECKS.get(node.op) if not node.domain else _OTHERS.get(node.domain)
    wrong = None if check is None else check(graph, node)
    if wrong is not None:
        raise UnsupportedError(
            f"nothing here runs {node.label}: {wrong}; the file is damaged, or made to do harm"
        )
    for inner in subgraphs(node.proto):
        for proto in inner.node:
            check_values(graph, Node(proto))


def check_empty(graph: Graph, nodes: Sequence[Node], outputs: Sequence[str]) -> None:
    """Look for sizes that it divides by; of an LSTM without steps, its cells are memory as it is.

    Raises:
        ValueError: onnx's reference may take their place.
    """
    wanted = {*outputs, *(name for node in nodes for name in node.reads)}
    for node in nodes:
        cells = named(node.outputs, 2) in wanted
        lstm = slice(2) if cells else slice(1, 2)
        sizes = {"GRU": slice(2), "LSTM": lstm, "InstanceNormalization": slice(None)}
        of = sizes.get(node.op)
        shape = graph.shape(node.inputs[0]) if of is not None and node.inputs else None
        if of is not None and shape is not None and 0 in shape[of]:
            raise ValueError(f"{node.label} has an input without elements")


def _shape(graph: Graph, node: Node, index: int) -> tuple[int, ...] | None:
    of = graph.type(named(node.inputs, index))
    return None if of is None else of.shape


def _uniform(graph: Graph, node: Node) -> str | None:
    low, high = node.attribute("low", 0.0), node.attribute("high", 1.0)
    if math.isfinite(high - low) and low <= high:
        return None
    return f"its bounds are {low:g} and {high:g}"


def _normal(graph: Graph, node: Node) -> str | None:
    scale = node.attribute("scale", 1.0)
    return None if 0 < scale < math.inf else f"its scale is {scale:g}, which has to be above 0"


def _gather_nd(graph: Graph, node: Node) -> str | None:
    dims = node.attribute("batch_dims", 0)
    ranks = [len(of) for i in range(2) if (of := _shape(graph, node, i)) is not None]
    if 0 <= dims < min(ranks, default=1 << 16):
        return None
    return f"its batch_dims are {dims}"


def _layer_norm(graph: Graph, node: Node) -> str | None:
    shape, axis = _shape(graph, node, 0), node.attribute("axis", -1)
    if shape is None:
        return None
    if not -len(shape) <= axis < len(shape):
        return f"its axis is {axis}, of {len(shape)}"
    wanted = shape[axis % len(shape) :]
    for i in (1, 2):
        of = _shape(graph, node, i)
        if of is not None and math.prod(of) != math.prod(wanted):
            return f"a weight has the shape {list(of)}, not {list(wanted)}"
    return None


def _resize(graph: Graph, node: Node) -> str | None:
    if len(node.inputs) == 2 and graph.opsets.get("", 11) < 11:
        return None  # scales
    if not any(node.inputs[2:4]):
        return "it has neither scales nor sizes"
    for i in (1, 2, 3):
        of = _shape(graph, node, i)
        if named(node.inputs, i) and of is not None and len(of) != 1:
            return f"an input for its sizes has the shape {list(of)}"
    scales = named(node.inputs, 2)
    if scales in graph.constants and graph.constants.is_small(scales):
        given = graph.constants.array(scales)
        if not (np.isfinite(given) & (given > 0)).all():
            return f"its scales are {given.tolist()}"
    return None


def _split(graph: Graph, node: Node) -> str | None:
    count = node.attribute("num_outputs")
    if count is None or count == len(node.outputs):
        return None
    return f"its num_outputs are {count}, of {len(node.outputs)}"


def _roi_align(graph: Graph, node: Node) -> str | None:
    ratio = node.attribute("sampling_ratio", 0)
    return None if 0 <= ratio <= _MOST_SAMPLES else f"its sampling_ratio is {ratio}"


def _fused(graph: Graph, node: Node) -> str | None:
    if node.op == "QLinearConcat":  # scale and zero point of the result, then values with theirs
        for i, name in enumerate(node.inputs):
            if not name or ((i < 2 or i % 3 != 2) and 0 in (_shape(graph, node, i) or ())):
                return f"its input {i} is left out, or has no elements"
    for name in filter(None, node.inputs):
        if name in graph.constants and 0 in (graph.constants.type(name).shape or ()):
            return f"{name} has no elements"
    return None


_OTHERS = {"com.microsoft": _fused}
_CHECKS: dict[str, Callable[[Graph, Node], str | None]] = {
    "GatherND": _gather_nd,
    "LayerNormalization": _layer_norm,
    "RandomNormal": _normal,
    "RandomNormalLike": _normal,
    "RandomUniform": _uniform,
    "RandomUniformLike": _uniform,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Split": _split,
}
