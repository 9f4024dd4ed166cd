"""headrace.TakeRuns: runs of channels from other places (`headrace.networks.patterns.runs`).

It takes rows (of 2 to 4 dimensions), and for the runs [rows, runs of a row] of what it makes the
numbers of those that it reads, which count row by row (below 0: zeros). `run` is the channels of
each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.kernels.taking import NOWHERE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, channel_axis, image_of

_MOST_BYTES = 1 << 33  # of what is read: places are int32, of floats


def _taken(graph: Graph, node: Node) -> Operation | None:
    x, numbers = node.inputs
    y, run = node.outputs[0], node.attribute("run")
    of, made = image_of(graph, x), image_of(graph, y)
    if of is None or made is None or x in graph.constants or of.n_bytes > _MOST_BYTES:
        return None
    if any(channel_axis(graph, n) != len(graph.shape(n) or ()) - 1 for n in (x, y)):
        return None
    at = graph.constants.array(numbers)
    if of.channels % run or at.shape != (made.images * made.pixels, made.channels // run):
        return None
    row, place = np.divmod(at, of.channels // run)
    table = np.where(at < 0, NOWHERE, row * of.padded + place * run).astype(np.int32)

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], at[y], at.own["table"], *table.shape, run, made.pixel_bytes]

    return Operation("rows_take_runs", [x], y, slots, [node], {"table": table})


OPERATORS = {"headrace.TakeRuns": _taken}
