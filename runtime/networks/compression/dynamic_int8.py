"""A float32 model whose products of rows are those of 8-bit integers, quantised as they come.

As onnxruntime's dynamic quantisation writes them: DynamicQuantizeLinear makes bytes of a product's
input by the range that it has then, MatMulInteger multiplies them by int8 weights that have a scale
for each output and no zero point (-127..127), and both scales multiply the sums. Encoders keep
more of what they knew than with ranges that were found before (`qdq`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from headrace.networks.compression.names import NewNames, reads

PRODUCTS = ("Gemm", "MatMul")


def quantised_products(model: Any) -> tuple[Any, Counter[str]]:
    """The model with integers in place of Gemm and MatMul that have constant weights of float32.

    Args:
        model: ModelProto with its weights inside, whose shapes are inferred.

    Returns:
        Another model, and how many nodes of each operator integers compute in it.
    """
    written = onnx.ModelProto()
    written.CopyFrom(model)
    writer = _Writer(written)
    counts: Counter[str] = Counter()
    nodes: list[Any] = []
    for node in model.graph.node:
        weight = writer.weight(node)
        if weight is None:
            nodes.append(node)
        else:
            counts[node.op_type] += 1
            nodes.extend(writer.product(node, weight))
    del written.graph.node[:]
    written.graph.node.extend(nodes)
    used = reads(written)
    kept = [one for one in written.graph.initializer if used[one.name]]
    del written.graph.initializer[:]
    written.graph.initializer.extend(kept)
    del written.graph.value_info[:]
    return written, counts


class _Writer:
    def __init__(self, model: Any) -> None:
        self._graph = model.graph
        self._constants = {one.name: one for one in model.graph.initializer}
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._ranks = {
            one.name: len(one.type.tensor_type.shape.dim)
            for one in values
            if one.type.tensor_type.HasField("shape")
        }
        self._codes: dict[str, list[str]] = {}  # of values that are quantised
        self._names = NewNames(model)

    def weight(self, node: Any) -> np.ndarray | None:
        """Of a product that integers can compute, [inputs, outputs]; None: it is none."""
        if node.op_type not in PRODUCTS or node.domain not in ("", "ai.onnx"):
            return None
        held = self._constants.get(node.input[1])
        if held is None or held.data_type != onnx.TensorProto.FLOAT or len(held.dims) != 2:
            return None
        if 0 in held.dims:
            return None
        if node.input[0] in self._constants or self._ranks.get(node.input[0], 0) < 2:
            return None
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        plain = (("transA", 0), ("alpha", 1.0), ("beta", 1.0))
        if any(given.get(name, value) != value for name, value in plain):
            return None
        w: np.ndarray = numpy_helper.to_array(held)
        return w.T if given.get("transB", 0) else w

    def product(self, node: Any, w: np.ndarray) -> list[Any]:
        """Nodes in place of one."""
        x, y, new = node.input[0], node.output[0], self._names.like
        nodes: list[Any] = []
        if x not in self._codes:
            self._codes[x] = [new(f"{x}_{what}") for what in ("quantized", "scale", "zero_point")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], self._codes[x]))
        codes, scale, zero = self._codes[x]
        most = np.abs(w).max(axis=0, initial=0).astype(np.float32) / np.float32(127)
        scales = np.where(most > 0, most, np.float32(1)).astype(np.float32)
        whole = np.clip(np.rint(w / scales), -127, 127).astype(np.int8)
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
        product = new(f"{y}_without_bias") if bias else y
        whole_sums, sums, both = new(f"{y}_int32"), new(f"{y}_sums"), new(f"{y}_scales")
        integers = [codes, self._constant(f"{y}_weight", whole), zero]
        factors = [scale, self._constant(f"{y}_weight_scale", scales)]
        nodes += [
            helper.make_node("MatMulInteger", integers, [whole_sums], node.name),
            helper.make_node("Cast", [whole_sums], [sums], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", factors, [both]),
            helper.make_node("Mul", [sums, both], [product]),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [y]))
        return nodes

    def _constant(self, name: str, values: np.ndarray) -> str:
        name = self._names.like(name)
        self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name
