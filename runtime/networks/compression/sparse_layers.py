"""Products of a model whose weights can become sparse."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from headrace.networks.compression.names import NewNames, reads

# What may stand between a classifier's product and an output of the model.
_BEHIND = {
    "Add", "Softmax", "LogSoftmax", "Sigmoid", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Identity", "Cast", "Clip", "ArgMax",
}  # fmt: skip
LEAST = 16  # channels read and written: less is never worth it


@dataclass(frozen=True)
class SparseLayer:
    """A 1x1 convolution, Gemm or MatMul.

    Attributes:
        node: NodeProto.
        weight: its TensorProto of float32, which is written to.
        transposed: whether it has [channels read, outputs] instead of [outputs, channels read].
        bias: its TensorProto; None: there is none.
        stride: of a convolution, down and across.
        ends: whether outputs of the model come out of it.
    """

    node: Any
    weight: Any
    transposed: bool
    bias: Any
    stride: tuple[int, int] | None
    ends: bool

    def matrix(self) -> np.ndarray:
        """Weights [outputs, channels read]."""
        w = numpy_helper.to_array(self.weight)
        if self.stride is not None:
            w = w[:, :, 0, 0]
        return np.ascontiguousarray(w.T if self.transposed else w)

    def put(self, matrix: np.ndarray) -> None:
        """Other weights."""
        w = (matrix.T if self.transposed else matrix).reshape(tuple(self.weight.dims))
        _put(self.weight, w)

    def put_bias(self, bias: np.ndarray) -> None:
        """Another bias, of the shape that it has."""
        _put(self.bias, bias.reshape(tuple(self.bias.dims)))

    def rows(self, x: np.ndarray) -> np.ndarray:
        """What it multiplies of its input, float32 [channels read, products]."""
        if self.stride is None:
            return x.reshape(-1, x.shape[-1]).T
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)


def own_biases(model: Any) -> None:
    """Give products a bias each that nothing else reads, in place.

    What makes up for the weights of one is wrong for others, and for whoever reads it as it was.
    """
    constants = {one.name: one for one in model.graph.initializer}
    used, names = reads(model), NewNames(model)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        held = constants.get(node.input[2])
        if held is None or used[held.name] == 1:
            continue
        used[held.name] -= 1
        own = model.graph.initializer.add()
        own.CopyFrom(held)
        own.name = node.input[2] = names.like(f"{held.name}/{node.output[0]}")


def _put(tensor: Any, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def sparse_layers(model: Any) -> list[SparseLayer]:
    """Those of a model, in its order; weights that several nodes have are not among them."""
    constants = {one.name: one for one in model.graph.initializer}
    used = reads(model)
    outputs = {one.name for one in model.graph.output}
    found = []
    for node in model.graph.node:
        layer = _layer(node, constants, _gives(model, node, constants, outputs))
        if layer is not None and layer.bias is None and node.op_type == "MatMul":
            layer = replace(layer, bias=_added(model, node, constants, used))
        if layer is not None and used[layer.weight.name] == 1:
            found.append(layer)
    return found


def _layer(node: Any, constants: dict[str, Any], ends: bool) -> SparseLayer | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return None
    weight = constants.get(node.input[1])
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT or node.input[0] in constants:
        return None
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    bias = constants.get(node.input[2]) if len(node.input) > 2 else None
    shape = tuple(weight.dims)
    if min(shape[:2]) < LEAST:
        return None
    if node.op_type == "Conv":
        if len(shape) != 4 or shape[2:] != (1, 1) or given.get("group", 1) != 1:
            return None
        if any(given.get("pads", ())):
            return None
        strides = given.get("strides", [1, 1])
        return SparseLayer(node, weight, False, bias, (strides[0], strides[1]), ends)
    if len(shape) != 2 or any(
        given.get(name, plain) != plain for name, plain in (("transA", 0), ("alpha", 1.0))
    ):
        return None
    if bias is not None and (bias.dims != [shape[0 if given.get("transB") else 1]] or
                             given.get("beta", 1.0) != 1.0):  # fmt: skip
        bias = None
    return SparseLayer(node, weight, not given.get("transB", 0), bias, None, ends)


def _added(
    model: Any, node: Any, constants: dict[str, Any], used: Counter[str]
) -> Any:  # fmt: skip
    """The constant that a sum adds to all rows of a product, and to nothing else; None: none."""
    name, width = node.output[0], constants[node.input[1]].dims[-1]
    users = [one for one in model.graph.node if name in one.input]
    if used[name] != 1 or len(users) != 1 or users[0].op_type != "Add":
        return None
    (other,) = [one for one in users[0].input if one != name] or [""]
    bias = constants.get(other)
    fits = bias is not None and list(bias.dims) == [width] and used[other] == 1
    return bias if fits else None


def _gives(model: Any, node: Any, constants: dict[str, Any], outputs: set[str]) -> bool:
    """Whether what a node makes comes out of the model but for sums with constants and the like."""
    name = node.output[0]
    while name not in outputs:
        users = [one for one in model.graph.node if name in one.input]
        if len(users) != 1 or users[0].op_type not in _BEHIND:
            return False
        if any(other != name and other not in constants for other in users[0].input if other):
            return False
        name = users[0].output[0]
    return True


def zeros(layers: list[SparseLayer]) -> float:
    """Share of the weights of layers that are zero."""
    matrices = [layer.matrix() for layer in layers]
    return 1 - sum(int(np.count_nonzero(w)) for w in matrices) / sum(w.size for w in matrices)
