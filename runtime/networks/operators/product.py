"""MatMul of two values that both come at run time: matrices, or batches of as many."""

from __future__ import annotations

from typing import Any

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, image_of


def product_of_values(graph: Graph, node: Node) -> Operation | None:
    """The operation; None: shapes do not fit, or one is a constant."""
    a, b = node.inputs[:2]
    y = node.outputs[0]
    read, with_, made = image_of(graph, a), image_of(graph, b), image_of(graph, y)
    shapes = [graph.shape(name) or () for name in (a, b, y)]
    if read is None or with_ is None or made is None:
        return None
    if a in graph.constants or b in graph.constants or any(len(s) not in (2, 3) for s in shapes):
        return None
    counts = [shape[0] if len(shape) == 3 else 1 for shape in shapes]
    if any(count not in (1, counts[2]) for count in counts[:2]):
        return None
    rows, inner = shapes[0][-2:]
    if shapes[1][-2] != inner or shapes[2][-2] != rows:
        return None
    apart = [
        shape[-2] * image.pixel_bytes if count > 1 else 0
        for shape, image, count in zip(shapes, (read, with_, made), counts, strict=True)
    ]

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[a], at[b], at[y], counts[2], rows, inner, made.padded, read.pixel_bytes,
            with_.pixel_bytes, made.pixel_bytes, *apart,
        ]  # fmt: skip

    return Operation(
        "product_rows_f32", list(dict.fromkeys((a, b))), y, slots, [node],
        macs=counts[2] * rows * inner * made.channels,
    )  # fmt: skip
