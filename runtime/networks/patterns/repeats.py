"""What several nodes compute alike is computed once."""

from __future__ import annotations

import onnx

from headrace.networks.graph import Graph, Node
from headrace.networks.specialise import NOT_CONSTANT


def without_repeats(graph: Graph) -> Graph:
    """The graph less nodes of ONNX that have the same inputs and attributes as an earlier one."""
    kept: set[str] = {name for node in graph.nodes for name in node.captured} | set(graph.outputs)
    known: dict[tuple[object, ...], list[str]] = {}
    renamed: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = [renamed.get(name, name) for name in node.inputs]
        if inputs != node.inputs:
            proto = onnx.NodeProto()
            proto.CopyFrom(node.proto)
            proto.input[:] = inputs
            # What it stands for reads values that may be gone.
            alone = node.ours_alone or bool(node.instead_of)
            node = Node(proto, node.captured, node.instead_of, alone)
        if node.captured or node.op in NOT_CONSTANT or kept.intersection(node.outputs):
            nodes.append(node)
            continue
        attributes = sorted(one.SerializeToString() for one in node.proto.attribute)
        present = tuple(bool(name) for name in node.outputs)
        key = (node.domain, node.op, *inputs, *attributes, present)
        if key in known:
            renamed.update(zip(node.outputs, known[key], strict=True))
        else:
            known[key] = node.outputs
            nodes.append(node)
    return graph if len(nodes) == len(graph.nodes) else graph.of(nodes)
