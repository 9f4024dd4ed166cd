"""headrace.Mask: what attention adds to scores (`headrace.networks.patterns.mask`).

It takes integers and gives float32 rows [batch, keys], in one of the forms of
`headrace.kernels.mask` that `form` says, with `sign`, `shift`, `first` and `second`. Integers are
[batch, keys], or [batch] in the form BEFORE, whatever dimensions of one they have besides; of each
`read` bytes count.
"""

from __future__ import annotations

from typing import Any

import onnx

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, image_of

# Bytes of an element.
READ = {
    int(onnx.TensorProto.BOOL): 1, int(onnx.TensorProto.UINT8): 1,
    int(onnx.TensorProto.INT32): 4, int(onnx.TensorProto.INT64): 8,
}  # fmt: skip


def _mask(graph: Graph, node: Node) -> Operation | None:
    x, y = node.inputs[0], node.outputs[0]
    of, made = graph.type(x), image_of(graph, y)
    if of is None or made is None or of.elem_type not in READ:
        return None
    how = [READ[of.elem_type], node.attribute("read"), node.attribute("form")]
    numbers = [float(node.attribute(name)) for name in ("sign", "shift", "first", "second")]

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], at[y], made.images, made.channels, made.padded, *how, *numbers]

    return Operation("rows_of_mask", [], y, slots, [node], plain=[x])


OPERATORS = {"headrace.Mask": _mask}
