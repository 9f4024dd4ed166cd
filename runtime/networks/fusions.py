"""Which of onnxruntime's fusions would change the results of some nodes.

Its fusion of quantised products takes scales of weights for those of their columns, and biases for
numbers in units of the products, whatever the file says; biases of floats are rounded to these even
where no fusion follows, with an operator that sets before 11 do not have. All else that is
quantised has one scale there, and what the file quantises twice, it quantises once. That of
normalisations takes any power for the second, any difference for that from the mean, and means that
have lost their dimension; it and others forget dimensions that constants add. That of products with
what is transposed forgets it beside a vector, and pools in blocks of channels divide by sizes that
are 0, which ends the process. Pairs that it adds behind values that are dequantised without a zero
point are of uint8. A Relu in front of codes of 4 bits, or floats of 8, goes as if they were bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from headrace.networks.graph import Graph, Node
from headrace.networks.microsoft_types import FLOAT
from headrace.networks.operation import BYTES
from headrace.networks.quantisation import elem_type, named
from headrace.networks.window_types import reaches_beyond

_QUANTISED, _BIASES = "QDQSelectorActionTransformer", "WeightBiasQuantization"
_NO_ZERO = "QDQPropagationTransformer"
_PAIRS = "DoubleQDQPairsRemover"  # quantises once what the file quantises twice
_NAMED = "/headrace/kept"
_TO_FLOATS, _TRANSPOSED = "MatMulIntegerToFloatFusion", "MatmulTransposeFusion"
_RECTIFIED = "ReluQuantRewrite"
_WHOLE = (2, 3, 4, 5)  # integers of 8 and 16 bits
_BLOCKS = "NchwcTransformer"
_NORMS = ("LayerNormFusionL1", "LayerNormFusionL2", "SimplifiedLayerNormFusion")
_OF_CONSTANTS = (
    *_NORMS, "GeluFusionL1", "GeluFusionL2", "FastGeluFusion",
    "QuickGeluFusion", "BiasSoftmaxFusion", "MatMulScaleFusion", "NoopElimination",
    "DivMulFusion",
)  # fmt: skip
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_CLOSE = 1e-4  # relatively: as files round scales of biases


def left_out(graph: Graph, nodes: Sequence[Node]) -> list[str]:
    """Names of these fusions, for nodes that are to run in one session."""
    makers = {name: node for node in nodes for name in node.outputs if name}
    products = [one for node in nodes if (one := _product(makers, node)) is not None]
    weights = {id(one.weights) for one in products}
    found = [_PAIRS] if any(node.op == "QuantizeLinear" for node in nodes) else []
    odd = any(_scales(graph, node) > 1 and id(node) not in weights for node in nodes)
    odd = odd or any(_odd_product(graph, makers, one) for one in products)
    if odd:
        found.append(_QUANTISED)
    old = graph.opsets.get("", 11) < 11
    if odd or any(_rounds_in_vain(graph, one, old) for one in products):
        found.append(_BIASES)
    if any(_odd_norm(graph, makers, node) for node in nodes):
        found += _NORMS
    if any(_has_no_zero(graph, node) for node in nodes):
        found.append(_NO_ZERO)
    if any(_is_rectified_oddly(graph, makers, node) for node in nodes):
        found.append(_RECTIFIED)
    if any(_widens(graph, node) for node in nodes):
        found.append(_TO_FLOATS)
    if any(_has_a_vector(graph, makers, node) for node in nodes):
        found.append(_TRANSPOSED)
    if any(_may_be_empty(graph, node) for node in nodes):
        found.append(_BLOCKS)
    if any(_constant_widens(graph, node) for node in nodes):
        found += [name for name in _OF_CONSTANTS if name not in found]
    return found


def ends_the_process(graph: Graph, nodes: Sequence[Node]) -> bool:
    """Whether its optimiser would: it moves transposes past nodes that it takes to be well made."""
    turns = any(node.op == "Transpose" for node in nodes)
    return turns and any(_joins_odd(graph, node) for node in nodes)


def _joins_odd(graph: Graph, node: Node) -> bool:
    """Whether Concat has inputs of several ranks, or a constant may have another."""
    if node.op != "Concat" or node.domain:
        return False
    types = [graph.type(name) for name in node.inputs]
    ranks = {None if of is None or of.shape is None else len(of.shape) for of in types}
    constant = any(name in graph.constants for name in node.inputs)
    return len(ranks - {None}) > 1 or (None in ranks and constant)


def _has_no_zero(graph: Graph, node: Node) -> bool:
    """Whether values that are no uint8 are dequantised without a zero point."""
    if node.domain or node.op != "DequantizeLinear" or named(node.inputs, 2):
        return False
    return elem_type(graph, node.inputs[0]) != onnx.TensorProto.UINT8


def _is_rectified_oddly(graph: Graph, makers: Mapping[str, Node], node: Node) -> bool:
    """Whether what comes from a Relu is quantised to no integers of 8 or 16 bits."""
    if node.domain or node.op != "QuantizeLinear" or _maker(makers, node.inputs[0], "Relu") is None:
        return False
    return elem_type(graph, node.outputs[0]) not in _WHOLE


def _has_a_vector(graph: Graph, makers: Mapping[str, Node], node: Node) -> bool:
    """Whether a product of one that may be a vector and another has something transposed."""
    if node.domain or node.op != "MatMul":
        return False
    turned = any(_maker(makers, name, "Transpose", "Cast") for name in node.inputs)
    return turned and any(len(_shape(graph, name)) < 2 for name in node.inputs)


def _may_be_empty(graph: Graph, node: Node) -> bool:
    """Whether a value has no element, or a pool has windows that reach beyond all there is."""
    if reaches_beyond(graph, node) or any(
        0 in _shape(graph, name) for name in (*node.reads, *node.outputs)
    ):
        return True
    same = node.attribute("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return same and node.op.endswith("Pool") and set(node.attribute("dilations", [1])) != {1}


def kept(graph: Graph, nodes: Sequence[Node], outputs: Sequence[str]) -> list[tuple[str, str]]:
    """Outputs that onnxruntime would quantise, as what is transposed of them is, and nobody else
    reads them there: each with a name for what is to read it.
    """
    if not any(node.op == "QuantizeLinear" for node in nodes):
        return []
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.reads:
            users.setdefault(name, []).append(node)
    return [
        (name, name + _NAMED)
        for name in outputs
        if [node.op for node in users.get(name, ())] == ["Transpose"]
        and elem_type(graph, name) == FLOAT
    ]


def _constant_widens(graph: Graph, node: Node) -> bool:
    """Whether a constant has more dimensions than what it is combined with, which they forget."""
    if node.domain or node.op not in ("Add", "Sub", "Mul", "Div", "Pow") or len(node.inputs) < 2:
        return False
    a, b = node.inputs[:2]
    if (a in graph.constants) == (b in graph.constants):
        return False
    constant, other = (a, b) if a in graph.constants else (b, a)
    of, wide = graph.types.get(other), len(graph.constants.type(constant).shape or ())
    return of is not None and of.shape is not None and wide > len(of.shape)


def _widens(graph: Graph, node: Node) -> bool:
    """Whether a sum has more dimensions than one of its operands, or a product of integers has
    several matrices, which its fusion forgets.
    """
    if node.op == "MatMulInteger" and not node.domain:
        return len(_shape(graph, node.inputs[1])) > 2
    if node.domain or node.op != "Add":
        return False
    made = graph.type(node.outputs[0])
    rank = len(made.shape or ()) if made is not None else 0
    return any(len(_shape(graph, n)) < rank for n in node.inputs if n not in graph.constants)


def _maker(makers: Mapping[str, Node], name: str, *ops: str) -> Node | None:
    node = makers.get(name)
    return node if node is not None and not node.domain and node.op in ops else None


def _scales(graph: Graph, node: Node) -> int:
    """How many there are of what is quantised, or of floats that are made of it."""
    if node.domain or node.op not in ("QuantizeLinear", "DequantizeLinear"):
        return 0
    return math.prod(_shape(graph, node.inputs[1]))


class _Product(NamedTuple):
    """Of quantised values: what makes them floats, and the bias ("": none)."""

    op: Node
    x: Node
    weights: Node
    bias: str


def _product(makers: Mapping[str, Node], node: Node) -> _Product | None:
    """A product that ends with a node: with its bias, or with a sum that becomes one."""
    op, bias = node, named(node.inputs, 2)
    if node.op == "Add" and not node.domain:
        products = [_maker(makers, name, "MatMul") for name in node.inputs[:2]]
        i = 0 if products[0] is not None else 1
        inner = products[i]
        if inner is None:
            return None
        op, bias = inner, node.inputs[1 - i]
    if op.domain or op.op not in _PRODUCTS:
        return None
    x, w = (_maker(makers, named(op.inputs, i), "DequantizeLinear") for i in range(2))
    return None if x is None or w is None else _Product(op, x, w, bias)


def _odd_product(graph: Graph, makers: Mapping[str, Node], of: _Product) -> bool:
    """Whether scales are not along columns, or the bias not in units of the products."""
    w, bias = of.weights, _maker(makers, of.bias, "DequantizeLinear")
    rank = len(_shape(graph, w.inputs[0]))
    columns = 0 if of.op.op == "Conv" or of.op.attribute("transB", 0) else rank - 1
    several = math.prod(_shape(graph, w.inputs[1])) > 1
    if several and (rank == 0 or w.attribute("axis", 1) % rank != columns):
        return True
    if several and rank != 2 and of.op.op == "MatMul":
        return True
    return bias is not None and not _in_units(graph, of.x.inputs[1], w.inputs[1], bias.inputs[1])


def _rounds_in_vain(graph: Graph, of: _Product, old: bool) -> bool:
    """Whether a product with a bias of floats is none that becomes one of integers."""
    if not of.bias:
        return False
    return old or any(elem_type(graph, one.inputs[0]) not in BYTES for one in (of.x, of.weights))


def _shape(graph: Graph, name: str) -> tuple[int, ...]:
    of = graph.type(name)
    return () if of is None else of.shape or ()


def _in_units(graph: Graph, x: str, w: str, bias: str) -> bool:
    """Whether the scale of a bias is the product of the others."""
    if any(name not in graph.constants for name in (x, w, bias)):
        return False
    of_x, of_w, given = (np.float64(graph.constants.array(n)).reshape(-1) for n in (x, w, bias))
    if given.size not in (1, of_w.size):
        return False
    return bool(np.allclose(of_x * of_w, given, rtol=_CLOSE, atol=0))


def _odd_norm(graph: Graph, makers: Mapping[str, Node], node: Node) -> bool:
    """Whether a quotient is nearly (x - mean) / sqrt(mean((x - mean)^2) + epsilon).

    Or nearly x / sqrt(mean(x^2) + epsilon).
    """
    root = _maker(makers, named(node.inputs, 1), "Sqrt") if node.op == "Div" else None
    if root is None:
        return False
    apart = _maker(makers, node.inputs[0], "Sub")
    if apart is not None:
        mean = _maker(makers, apart.inputs[1], "ReduceMean")
        if mean is None or mean.inputs[0] != apart.inputs[0] or not mean.attribute("keepdims", 1):
            return True
    more = _maker(makers, root.inputs[0], "Add")
    for name in more.inputs if more is not None else ():
        variance = _maker(makers, name, "ReduceMean")
        power = None if variance is None else _maker(makers, variance.inputs[0], "Pow")
        if variance is None or power is None:
            continue
        if not variance.attribute("keepdims", 1) or not _is_two(graph, power.inputs[1]):
            return True
    return False


def _is_two(graph: Graph, name: str) -> bool:
    if name not in graph.constants or not graph.constants.is_small(name):
        return False
    return bool((graph.constants.array(name) == 2).all())
