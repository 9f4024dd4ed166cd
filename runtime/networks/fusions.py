"""Which of onnxruntime's fusions would change the results of some nodes.

Its fusion of quantised products takes scales of weights for those of their columns, and biases for
numbers in units of the products, whatever the file says; biases of floats are rounded to these even
where no fusion follows, with an operator that sets before 11 do not have. That of normalisations
takes any power for the second, and any difference for that from the mean, and means that have lost
their dimension; it and others forget dimensions that constants add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import BYTES
from headrace.networks.quantisation import elem_type, named

_QUANTISED, _BIASES = "QDQSelectorActionTransformer", "WeightBiasQuantization"
_TO_FLOATS = "MatMulIntegerToFloatFusion"
_NORMS = ("LayerNormFusionL1", "LayerNormFusionL2", "SimplifiedLayerNormFusion")
_OF_CONSTANTS = (
    *_NORMS, "GeluFusionL1", "GeluFusionL2", "FastGeluFusion",
    "QuickGeluFusion", "BiasSoftmaxFusion", "MatMulScaleFusion", "NoopElimination",
    "DivMulFusion",
)  # fmt: skip
_CLOSE = 1e-4  # relatively: as files round scales of biases


def left_out(graph: Graph, nodes: Sequence[Node]) -> list[str]:
    """Names of these fusions, for nodes that are to run in one session."""
    makers = {name: node for node in nodes for name in node.outputs if name}
    found: list[str] = []
    if any(_odd_product(graph, makers, node) for node in nodes):
        found.append(_QUANTISED)
    old = graph.opsets.get("", 11) < 11
    if found or any(_rounds_in_vain(graph, makers, node, old) for node in nodes):
        found.append(_BIASES)
    if any(_odd_norm(graph, makers, node) for node in nodes):
        found += _NORMS
    if any(_widens(graph, node) for node in nodes):
        found.append(_TO_FLOATS)
    if any(_constant_widens(graph, node) for node in nodes):
        found += [name for name in _OF_CONSTANTS if name not in found]
    return found


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
    """Whether a sum has more dimensions than one of its operands, which its fusion forgets."""
    if node.domain or node.op != "Add":
        return False
    made = graph.type(node.outputs[0])
    rank = len(made.shape or ()) if made is not None else 0
    return any(len(_shape(graph, n)) < rank for n in node.inputs if n not in graph.constants)


def _maker(makers: Mapping[str, Node], name: str, *ops: str) -> Node | None:
    node = makers.get(name)
    return node if node is not None and not node.domain and node.op in ops else None


def _odd_product(graph: Graph, makers: Mapping[str, Node], node: Node) -> bool:
    if node.domain or node.op not in ("Conv", "Gemm", "MatMul"):
        return False
    x, w, bias = (_maker(makers, named(node.inputs, i), "DequantizeLinear") for i in range(3))
    if x is None or w is None:
        return False
    rank = len(_shape(graph, w.inputs[0]))
    columns = 0 if node.op == "Conv" or node.attribute("transB", 0) else rank - 1
    several = math.prod(_shape(graph, w.inputs[1])) > 1
    if several and (rank == 0 or w.attribute("axis", 1) % rank != columns):
        return True
    return bias is not None and not _in_units(graph, x.inputs[1], w.inputs[1], bias.inputs[1])


def _rounds_in_vain(graph: Graph, makers: Mapping[str, Node], node: Node, old: bool) -> bool:
    """Whether a product with a bias of floats is none that becomes one of integers."""
    if node.domain or node.op not in ("Conv", "Gemm") or not named(node.inputs, 2):
        return False
    sources = [_maker(makers, name, "DequantizeLinear") for name in node.inputs[:2]]
    if any(one is None for one in sources):
        return False
    return old or any(one and elem_type(graph, one.inputs[0]) not in BYTES for one in sources)


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
