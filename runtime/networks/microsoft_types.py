"""Types of what operators of com.microsoft give, which the package onnx does not know.

Their text: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headrace.networks.graph import Node, TensorType

FLOAT, INT32 = 1, 6  # of TensorProto

Types = Mapping[str, TensorType]


def microsoft_types(node: Node, types: Types) -> dict[str, TensorType]:
    """Of a node's outputs, as far as they are known, from those of its inputs."""
    rule = _RULES.get(node.op)
    if rule is None or any(types[n].shape is None for n in node.inputs if n in types):
        return {}
    try:
        found = rule(node, types)
    except (KeyError, IndexError, TypeError, ValueError):  # an input is missing, or of another rank
        return {}
    return {name: of for name, of in zip(node.outputs, found, strict=False) if name and of}


def _shape(types: Types, name: str) -> tuple[int, ...]:
    shape = types[name].shape
    assert shape is not None
    return shape


def _as_first(node: Node, types: Types) -> list[TensorType | None]:
    return [types[node.inputs[0]]]


def _skip(node: Node, types: Types) -> list[TensorType | None]:
    x = types[node.inputs[0]]
    rows = TensorType(FLOAT, (*(x.shape or ())[:-1], 1))
    return [x, rows, rows, x]


def _attention(node: Node, types: Types) -> list[TensorType | None]:
    batch, tokens, _ = _shape(types, node.inputs[0])
    sizes = node.attribute("qkv_hidden_sizes")
    width = sizes[2] if sizes else _shape(types, node.inputs[1])[1] // 3
    of = FLOAT if node.op == "QAttention" else types[node.inputs[0]].elem_type
    return [TensorType(of, (batch, tokens, width))]


def _embed(node: Node, types: Types) -> list[TensorType | None]:
    batch, tokens = _shape(types, node.inputs[0])
    words = types[node.inputs[2]]
    whole = TensorType(words.elem_type, (batch, tokens, _shape(types, node.inputs[2])[1]))
    return [whole, TensorType(INT32, (batch,)), whole]


def _product(node: Node, types: Types) -> list[TensorType | None]:
    a, b = _shape(types, node.inputs[0]), _shape(types, node.inputs[1])
    if node.attribute("transBatchA", 0) or node.attribute("transBatchB", 0):
        return []
    if len(a) < 2 or len(b) < 2:
        return []
    rows = a[-1] if node.attribute("transA", 0) else a[-2]
    columns = b[-2] if node.attribute("transB", 0) else b[-1]
    batch = a[:-2] if len(a) >= len(b) else b[:-2]
    if len(a) > 2 and len(b) > 2 and a[:-2] != b[:-2]:
        return []
    return [TensorType(FLOAT, (*batch, rows, columns))]


def _n_bits(node: Node, types: Types) -> list[TensorType | None]:
    x = types[node.inputs[0]]
    return [TensorType(x.elem_type, (*(x.shape or ())[:-1], int(node.attribute("N"))))]


_RULES: dict[str, Callable[[Node, Types], list[TensorType | None]]] = {
    "Attention": _attention,
    "BiasGelu": _as_first,
    "DynamicQuantizeMatMul": _product,
    "EmbedLayerNormalization": _embed,
    "FastGelu": _as_first,
    "FusedMatMul": _product,
    "Gelu": _as_first,
    "MatMulIntegerToFloat": _product,
    "MatMulNBits": _n_bits,
    "MultiHeadAttention": _as_first,
    "QAttention": _attention,
    "QuickGelu": _as_first,
    "SkipLayerNormalization": _skip,
}
