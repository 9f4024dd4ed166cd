"""Operators of ONNX that have kernels of ours: a file for each kind, and the table of them all.

Those of other domains have these in front of their names. An entry gives the operation for a node,
or None where its kernel does not do this one: then the host computes it.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Operation, bytes_of, image_of
from headrace.networks.operators import (
    activations,
    arithmetic,
    attention,
    bounds,
    channels,
    convolution,
    dynamic,
    frames,
    gathering,
    gelu,
    mask,
    matrix,
    mean,
    moments,
    n_bits,
    names,
    normalisation,
    pooling,
    quantised,
    quantised_images,
    recurrent,
    resizing,
    runs,
    softmax,
    softmax_mean,
    taking,
    transposed,
)

# Of nodes that lack inputs, outputs or attributes, or have those of another kind: the host says so.
MALFORMED = (IndexError, TypeError, ValueError, ArithmeticError, AttributeError)
Maker = Callable[[Graph, Node], Operation | None]

MODULES = (
    convolution, frames, matrix, n_bits, mean, arithmetic, activations, channels, taking, pooling,
    resizing, softmax, transposed, bounds, names, normalisation, moments, gelu, attention,
    mask, quantised, dynamic, gathering, quantised_images, softmax_mean, recurrent, runs,
)  # fmt: skip
OPERATORS: dict[str, Maker] = {
    name: maker for module in MODULES for name, maker in module.OPERATORS.items()
}


def key_of(node: Node) -> str:
    """What its operator is called in the table."""
    return f"{node.domain}.{node.op}" if node.domain else node.op


def operation_for(graph: Graph, node: Node) -> Operation | None:
    """Our operation for a node; None: there is none."""
    maker = OPERATORS.get(key_of(node))
    try:
        found = None if maker is None else maker(graph, node)
    except MALFORMED:
        return None
    if found is None or not all(_lies(graph, node, one) for one in (found, *found.also)):
        return None
    read = {name for one in (found, *found.also) for name in (*one.inputs, *one.plain)}
    # Constants do not come in: an operation has those that it takes for itself.
    return None if any(name in graph.constants for name in read) else found


def _lies(graph: Graph, node: Node, one: Operation) -> bool:
    """Whether its result is of a kind that values of ours are; what a file declares may differ."""
    if one.makes not in node.outputs:
        return True  # a step in between
    return image_of(graph, one.makes) is not None or bytes_of(graph, one.makes) is not None
