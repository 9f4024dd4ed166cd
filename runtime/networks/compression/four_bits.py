"""Weights of matrices as 4-bit integers: onnxruntime's MatMulNBits takes the place of products.

Without inputs weights are rounded to nearest, with scales that are searched for. With inputs, layer
by layer (`reconstruction`), later weights make up for what rounding earlier ones costs (GPTQ,
`headrace.sparse.gptq`), those of the largest inputs first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from headrace.networks.compression.names import NewNames
from headrace.networks.compression.reconstruction import in_order
from headrace.networks.compression.samples import Sample
from headrace.networks.compression.sparse_layers import SparseLayer, sparse_layers
from headrace.sparse.format import Bytes, Floats
from headrace.sparse.gptq import gptq, inverse_factor, largest_first, unmade
from headrace.sparse.grid import Grid
from headrace.sparse.n_bits import parts_of, weights_of
from headrace.sparse.n_bits_fit import grid

# Inputs that share a scale, and whether zero is always code 8.
FORMATS = {
    f"{name}_g{group}": (group, name == "i4") for name in ("i4", "i4a") for group in (32, 64, 128)
}
DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
INT8 = 4  # accuracy_level: activations may become bytes


def quantise(
    model: Any, format: str, samples: Sequence[Sample] | None,
    notice: Callable[[str], None] = lambda text: None,
) -> int:  # fmt: skip
    """Give a model's matrices 4 bits, in place; how many there were.

    Args:
        model: ModelProto with its weights inside.
        format: of `FORMATS`.
        samples: inputs to look at; None: round to nearest.
        notice: is told what happens.

    Raises:
        UnsupportedError: onnxruntime does not run it.
    """
    group, symmetric = FORMATS[format]
    layers = [layer for layer in sparse_layers(model) if _is_product(layer)]
    to = grid(group, symmetric)
    rounded: list[tuple[SparseLayer, Bytes]] = []
    if samples is None:
        for layer in layers:
            w = _padded(layer.matrix(), group)
            rounded.append((layer, to.round(w, to.fit(w, None))))
    else:
        for layer, of in in_order(model, layers, samples, notice):
            n = layer.matrix().shape[1]
            raw = _rounded(_padded(of.wanted(layer.matrix()), group), to, of.zz)
            rounded.append((layer, raw))
            of.put(layer, weights_of(*parts_of(raw, group))[:, :n])
    names = NewNames(model)
    for layer, raw in rounded:
        _replace(model, names, layer, raw, group, symmetric)
    if layers and DOMAIN not in {one.domain for one in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return len(layers)


def _is_product(layer: SparseLayer) -> bool:
    given = len(layer.node.input) > 2 and bool(layer.node.input[2])
    return layer.stride is None and (layer.bias is not None or not given)


def _padded(w: Floats, group: int) -> Floats:
    return np.pad(w, ((0, 0), (0, -w.shape[1] % group)))


def _rounded(w: Floats, to: Grid, zz: Floats) -> Bytes:
    h = np.zeros((w.shape[1], w.shape[1]), np.float32)
    h[: len(zz), : len(zz)] = zz
    order = largest_first(h)
    u = inverse_factor(h, order=order)
    importance = np.empty(len(h), np.float32)
    importance[order] = unmade(u)
    return gptq(w, to, u, to.fit(w, importance), order=order)


def _pairs(codes: Bytes) -> Bytes:
    """Codes [rows, n] in bytes, the even one of two in the low half."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: Bytes = even[:, 0::2] | even[:, 1::2] << 4
    return packed


def _replace(
    model: Any, names: NewNames, layer: SparseLayer, raw: Bytes, group: int, symmetric: bool
) -> None:
    node, name = layer.node, layer.weight.name
    outputs, read = layer.matrix().shape
    codes, zeros, scales = parts_of(raw, group)
    tensors = {
        names.like(f"{name}_n4"): _pairs(codes).reshape(outputs, -1, group // 2),
        names.like(f"{name}_scales"): scales.reshape(-1),
    }
    if not symmetric:
        tensors[names.like(f"{name}_zeros")] = _pairs(zeros).reshape(-1)
    inputs = [node.input[0], *tensors]
    if len(node.input) > 2 and node.input[2]:  # of MatMul a sum that stands behind it stays
        inputs += [""] * (5 - len(inputs)) + [node.input[2]]
    made = helper.make_node(
        OPERATOR, inputs, list(node.output), name=node.name, domain=DOMAIN, K=read, N=outputs,
        bits=4, block_size=group, accuracy_level=INT8,
    )  # fmt: skip
    model.graph.initializer.remove(layer.weight)
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in tensors.items())
    node.CopyFrom(made)
