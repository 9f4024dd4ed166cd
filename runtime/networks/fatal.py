"""Nodes over which onnxruntime would end the process: it takes their values to be well made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx

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
    try:
        wrong = _wrong(graph, node)
    except (TypeError, ValueError, AttributeError):
        wrong = "an attribute is of another type than it should be"
    if wrong is not None:
        raise UnsupportedError(
            f"nothing here runs {node.label}: {wrong}; the file is damaged, or made to do harm"
        )
    for inner in subgraphs(node.proto):
        for proto in inner.node:
            check_values(graph, Node(proto))


def completed(graph: Graph, node: Node) -> Node:
    """A node with a zero point of its result that may be left out, and onnxruntime reads."""
    if node.domain != "com.microsoft" or node.op not in ("QLinearSigmoid", "QLinearLeakyRelu"):
        return node
    of = graph.type(named(node.inputs, 0))
    if named(node.inputs, 4) or len(node.inputs) < 4 or of is None:
        return node
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    zero = np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(of.elem_type))
    proto.input[4:] = [graph.constants.put(zero)]
    return Node(proto)


def _wrong(graph: Graph, node: Node) -> str | None:
    """What ends the process; None: nothing that is known."""
    key = f"{node.domain}.{node.op}" if node.domain else node.op
    for i, (least, most) in _RANKS.get(key, {}).items():
        of = _shape(graph, node, i)
        if named(node.inputs, i) and of is not None and not least <= len(of) <= most:
            return f"its input {i} has {len(of)} dimensions"
    for check in (_CHECKS.get(key), _fused if node.domain == "com.microsoft" else None):
        wrong = None if check is None else check(graph, node)
        if wrong is not None:
            return wrong
    return None


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


def _saturates(graph: Graph, node: Node) -> str | None:
    given = node.attribute("saturate", 1)
    return None if given in (0, 1) else f"its saturate is {given}, which is 0 or 1"


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
    for name in filter(None, node.inputs):
        if name in graph.constants and 0 in (graph.constants.type(name).shape or ()):
            return f"{name} has no elements"
    return None


def _quantised(graph: Graph, node: Node) -> str | None:
    """Of scales and zero points, of which it reads one element."""
    values = _VALUES[node.op]
    for i, name in enumerate(node.inputs):
        if i % 3 == 2 if values is None else i in values:
            continue
        of = _shape(graph, node, i)
        if name and of is not None and math.prod(of) != 1:
            return f"its input {i}, a scale or a zero point, has {math.prod(of)} elements"
    return None


def _concatenated(graph: Graph, node: Node) -> str | None:
    left_out = [i for i, name in enumerate(node.inputs) if not name]
    return f"its input {left_out[0]} is left out" if left_out else _quantised(graph, node)


def _chosen(graph: Graph, node: Node) -> str | None:
    shapes = [of for i in (0, 1, 4) if (of := _shape(graph, node, i)) is not None]
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return f"its inputs have the shapes {', '.join(str(list(of)) for of in shapes)}"
    return _quantised(graph, node)


def _scaled(graph: Graph, node: Node) -> str | None:
    """Of products with weights, which have one scale or one for each column (of each matrix)."""
    of, at = _shape(graph, node, 1), 2 if node.op == "DynamicQuantizeMatMul" else 3
    scales = _shape(graph, node, at)
    if of is None or scales is None or len(of) < 2:
        return None
    if math.prod(scales) in (1, of[-1], math.prod(of[:-2]) * of[-1]):
        return None
    return f"its input {at} has {math.prod(scales)} scales, of {of[-1]} columns"


def _inverse(graph: Graph, node: Node) -> str | None:
    of = _shape(graph, node, 0)
    if of is None or (len(of) > 1 and of[-1] == of[-2]):
        return None
    return f"it has matrices of the shape {list(of[-2:])}"


def _upsample(graph: Graph, node: Node) -> str | None:
    of, scales = _shape(graph, node, 0), node.attribute("scales")
    count = None if scales is None else len(scales)
    if scales is None and len(node.inputs) > 1:
        given = _shape(graph, node, 1)
        count = None if given is None else math.prod(given)
    if of is None or count in (None, len(of)):
        return None
    return f"it has {count} scales, for {len(of)} dimensions"


def _in_blocks(graph: Graph, node: Node) -> str | None:
    size, of = node.attribute("block_size", 0), _shape(graph, node, 0)
    most = _MOST_BLOCK if of is None else max((1, *of))
    return None if 0 <= size <= most else f"its block_size is {size}"


def _ngrams(graph: Graph, node: Node) -> str | None:
    counts = node.attribute("ngram_counts", [])
    pool = node.attribute("pool_int64s") or node.attribute("pool_strings") or []
    within = all(0 <= n <= len(pool) for n in counts)
    if within and list(counts) == sorted(counts):
        return None
    return f"its ngram_counts are {list(counts)[:8]}, of a pool of {len(pool)}"


_MANY = 1 << 16
_MOST_BLOCK = (1 << 31) - 1
# Dimensions of inputs, at least and at most.
_RANKS: dict[str, dict[int, tuple[int, int]]] = {
    "DFT": {0: (2, _MANY), 1: (0, 0), 2: (0, 0)}, "Multinomial": {0: (2, 2)},
    "RoiAlign": {0: (4, 4), 1: (2, 2), 2: (1, 1)},
    "STFT": {0: (2, 3)}, "MaxRoiPool": {0: (4, 4), 1: (2, 2)},
    "ReverseSequence": {0: (2, _MANY), 1: (1, 1)},
    "com.microsoft.AttnLSTM": {
        **dict.fromkeys((0, 1, 2, 5, 6, 11), (3, 3)), **dict.fromkeys((3, 7, 8, 9, 13), (2, 2)),
        **dict.fromkeys((4, 10, 12), (1, 1)),
    },
    "com.microsoft.DynamicQuantizeMatMul": {1: (2, _MANY)},
    "com.microsoft.MatMulIntegerToFloat": {1: (2, _MANY)},
    "com.microsoft.EmbedLayerNormalization": {
        **dict.fromkeys((0, 1, 2, 3, 4, 8), (2, 2)), 5: (1, 1), 6: (1, 1),
    },
}  # fmt: skip
# Which inputs of quantised operators are values; None: each third from the third on.
_VALUES: dict[str, tuple[int, ...] | None] = {
    "QLinearAdd": (0, 3), "QLinearMul": (0, 3), "QLinearSigmoid": (0,), "QLinearLeakyRelu": (0,),
    "QLinearSoftmax": (0,), "QLinearAveragePool": (0,), "QLinearGlobalAveragePool": (0,),
    "QLinearWhere": (0, 1, 4), "QLinearConcat": None,
}  # fmt: skip
_CHECKS: dict[str, Callable[[Graph, Node], str | None]] = {
    "Cast": _saturates,
    "CastLike": _saturates,
    "DequantizeLinear": _in_blocks,
    "GatherND": _gather_nd,
    "LayerNormalization": _layer_norm,
    "QuantizeLinear": _in_blocks,
    "RandomNormal": _normal,
    "RandomNormalLike": _normal,
    "RandomUniform": _uniform,
    "RandomUniformLike": _uniform,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Split": _split,
    "TfIdfVectorizer": _ngrams,
    "Upsample": _upsample,
    "com.microsoft.Inverse": _inverse,
    **{f"com.microsoft.{op}": _quantised for op in _VALUES},
    "com.microsoft.DynamicQuantizeMatMul": _scaled,
    "com.microsoft.MatMulIntegerToFloat": _scaled,
    "com.microsoft.QLinearConcat": _concatenated,
    "com.microsoft.QLinearWhere": _chosen,
}
