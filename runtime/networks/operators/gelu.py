"""Gelu."""

from __future__ import annotations

from typing import Any

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, image_of

_KERNELS = {b"none": "gelu_erf_f32", b"tanh": "gelu_tanh_f32"}


def _gelu(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    of = image_of(graph, x)
    kernel = _KERNELS.get(node.attribute("approximate", b"none"))
    if of is None or x in graph.constants or kernel is None:
        return None

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], at[one.makes], of.n_bytes // 64]

    return Operation(kernel, [x], node.outputs[0], slots, [node])


OPERATORS = {"Gelu": _gelu}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Gelu": "both forms",
}
