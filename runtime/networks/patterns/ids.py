"""Ids of rows that are made int32 first, as onnxruntime's optimiser writes them: taken as they are.

Ids that do not fit would wrap; here they are none of the table's, which is said.
"""

from __future__ import annotations

import onnx

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher

_OPS = {("", "Gather"), ("headrace", "Rows"), ("headrace", "QuantisedRows")}


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """The same rows, by ids of 64 bits."""
    if (node.domain, node.op) not in _OPS:
        return None
    cast = matcher.maker(node.inputs[1], "Cast")
    of = None if cast is None else matcher.graph.type(cast.inputs[0])
    if cast is None or of is None or of.elem_type != onnx.TensorProto.INT64:
        return None
    if cast.attribute("to") != onnx.TensorProto.INT32 or cast.inputs[0] in matcher.graph.constants:
        return None
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[1] = cast.inputs[0]
    return [Node(proto)]
