"""Gather of rows of a constant float32 table: embeddings; and of a value by constant numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, Table, Weight, image_of
from headrace.networks.operators.taking import rows_by_number

_ID_BYTES = {int(onnx.TensorProto.INT32): 4, int(onnx.TensorProto.INT64): 8}


def _gather(graph: Graph, node: Node) -> Operation | None:
    name, ids = node.inputs
    of, made = graph.types.get(ids), image_of(graph, node.outputs[0])
    if ids in graph.constants:
        return rows_by_number(graph, node)
    if name not in graph.constants or of is None or made is None:
        return None
    table = graph.constants.type(name)
    if table.elem_type != onnx.TensorProto.FLOAT or len(table.shape or ()) != 2:
        return None
    entries, width = table.shape or (0, 0)
    if of.elem_type not in _ID_BYTES or of.shape is None or len(of.shape) not in (1, 2):
        return None
    if node.attribute("axis", 0) not in (0, -2) or entries == 0:
        return None
    rows, padded, id_bytes = made.images, made.padded, _ID_BYTES[of.elem_type]

    def whole() -> np.ndarray:
        array = graph.constants.array(name)
        return array if padded == width else np.pad(array, ((0, 0), (0, padded - width)))

    def runs() -> Iterator[tuple[int, np.ndarray]]:
        for first, rows in graph.constants.rows(name):
            yield 4 * padded * first, np.pad(rows, ((0, 0), (0, padded - width)))

    def slots(one: Operation, at: Addresses) -> list[Any]:
        # Of rows that are read from a file, numbers among these.
        numbers = at.own["ids"] if "ids" in at.own else at[ids]
        return [at.own["table"], numbers, at[one.makes], rows, padded, entries, id_bytes]

    key = graph.constants.identity(name)
    place = graph.constants.place(name) if padded == width else None
    weight = Weight(
        4 * entries * padded, whole, None if key is None else ("rows", key),
        runs if graph.constants.in_runs(name) else None, place,
    )  # fmt: skip
    return Operation(
        "rows_f32_gather", [], node.outputs[0], slots, [node], {"table": weight}, plain=[ids],
        bounds={ids: (-entries, entries - 1)}, table=Table("table", ids, entries, 4 * padded, rows),
    )  # fmt: skip


OPERATORS = {"Gather": _gather}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Gather": "rows of a constant float32 table; ids are checked; of a value, constant numbers",
}
