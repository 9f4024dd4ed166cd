"""Gather of rows of a constant table: embeddings; and of a value by constant numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import BYTES, Addresses, Operation, Table, Weight, image_of
from headrace.networks.operators.taking import rows_by_number
from headrace.networks.quantisation import added, named, quantisation

_ID_BYTES = {int(onnx.TensorProto.INT32): 4, int(onnx.TensorProto.INT64): 8}


def _gather(graph: Graph, node: Node) -> Operation | None:
    name, ids = node.inputs
    if ids in graph.constants:
        return rows_by_number(graph, node)
    if name not in graph.constants or node.attribute("axis", 0) not in (0, -2):
        return None
    if graph.constants.type(name).elem_type != onnx.TensorProto.FLOAT:
        return None
    return _rows(graph, node, "rows_f32_gather", 4, 0, [])


def _words(graph: Graph, node: Node) -> Operation | None:
    """Of a table and ids, which do not count from the end."""
    made = _gather(graph, node)
    if made is None or made.table is None:
        return None
    return replace(made, bounds={made.table.ids: (0, made.table.entries - 1)})


def _quantised_rows(graph: Graph, node: Node) -> Operation | None:
    """Of a table of bytes with one scale: inputs table, ids, scale, zero point."""
    name, _, scale = node.inputs[:3]
    if name not in graph.constants or graph.constants.type(name).elem_type not in BYTES:
        return None
    kind = graph.constants.type(name).elem_type
    of = quantisation(graph, scale, named(node.inputs, 3), kind)
    if of is None:
        return None
    zero, signed = of.zero - added(kind), kind == onnx.TensorProto.INT8
    more = [int(signed), of.scale, zero]
    return _rows(graph, node, "rows_byte_gather", 1, zero, more)


def _rows(
    graph: Graph, node: Node, kernel: str, item: int, pad: int, more: list[Any]
) -> Operation | None:
    """Rows of a constant table as ids say.

    Args:
        item: bytes of an element of the table.
        pad: what stands behind rows of other lengths than of whole vectors.
        more: slots of the kernel behind those that all have.
    """
    name, ids = node.inputs[:2]
    of, made = graph.types.get(ids), image_of(graph, node.outputs[0])
    table = graph.constants.type(name)
    if of is None or made is None or len(table.shape or ()) != 2:
        return None
    entries, width = table.shape or (0, 0)
    if of.elem_type not in _ID_BYTES or of.shape is None or len(of.shape) not in (1, 2):
        return None
    if entries == 0:
        return None
    rows, padded, id_bytes = made.images, made.padded, _ID_BYTES[of.elem_type]

    def with_pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, padded - width)), constant_values=pad)

    def whole() -> np.ndarray:
        array = graph.constants.array(name)
        return array if padded == width else with_pad(array)

    def runs() -> Iterator[tuple[int, np.ndarray]]:
        for first, part in graph.constants.rows(name):
            yield item * padded * first, with_pad(part)

    def slots(one: Operation, at: Addresses) -> list[Any]:
        # Of rows that are read from a file, numbers among these.
        numbers = at.own["ids"] if "ids" in at.own else at[ids]
        return [at.own["table"], numbers, at[one.makes], rows, padded, entries, id_bytes, *more]

    key = graph.constants.identity(name)
    place = graph.constants.place(name) if padded == width else None
    weight = Weight(
        item * entries * padded, whole, None if key is None else ("rows", key, pad),
        runs if graph.constants.in_runs(name) else None, place,
    )  # fmt: skip
    return Operation(
        kernel, [], node.outputs[0], slots, [node], {"table": weight}, plain=[ids],
        bounds={ids: (-entries, entries - 1)},
        table=Table("table", ids, entries, item * padded, rows),
    )  # fmt: skip


OPERATORS = {"Gather": _gather, "headrace.Rows": _words, "headrace.QuantisedRows": _quantised_rows}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Gather": (
        "rows of a constant table, float32 or dequantised with one scale; ids are checked; of a "
        "value, constant numbers"
    ),
}
