"""Pad, Slice and Gather of fixed places: what is read from other pixels, or from other channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.kernels.taking import NOWHERE
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, channel_axis, image_of
from headrace.networks.operators.channels import part
from headrace.networks.quantisation import named

MOST_PLACES = 1 << 24  # of a dimension, as each has a number
# By dimension, which elements of it are taken; others: all, in order.
Places = dict[int, np.ndarray]
MOST_PADS = 1 << 24  # of a dimension: its places are a table
_PAD_MODES = {b"constant": "constant", b"reflect": "reflect", b"edge": "edge", b"wrap": "wrap"}


def taken(
    graph: Graph, node: Node, places: Places, given: float = 0.0, gone: int | None = None
) -> Operation | None:
    """The operation of a node that takes elements of its first input.

    Args:
        places: `NOWHERE` among them gets `given`.
        gone: the dimension that the output lacks; None: it has all.
    """
    x, y = node.inputs[0], node.outputs[0]
    of, made, shape = image_of(graph, x), image_of(graph, y), graph.shape(x) or ()
    if of is None or made is None or x in graph.constants or max(shape) > MOST_PLACES:
        return None
    axis, left = channel_axis(graph, x), [i for i in range(len(shape)) if i != gone]
    if channel_axis(graph, y) >= len(left) or left[channel_axis(graph, y)] != axis:
        return None
    places = {i: at for i, at in places.items() if not np.array_equal(at, np.arange(shape[i]))}
    sizes = [len(places[i]) if i in places else n for i, n in enumerate(shape)]
    if made.channels != sizes[axis] or made.images * made.pixels * made.channels != math.prod(
        sizes
    ):
        return None
    if axis in places:
        return _channels(node, places[axis], given, of, made) if len(places) == 1 else None
    pixels = [i for i in range(len(shape)) if i != axis]
    tables = [places.get(i, np.arange(shape[i])).astype(np.int32) for i in pixels]
    while len(tables) < 3:
        tables.insert(0, np.zeros(1, np.int32))
    rows, columns = ([1, 1, *(shape[i] for i in pixels)])[-2:]
    fill = np.zeros(of.padded, np.float32)
    fill[: of.channels] = given

    def slots(one: Operation, at: Addresses) -> list[Any]:
        steps = one.step(one.reads[0], of), one.step(one.makes, made)
        places = [at.own[name] for name in ("images", "rows", "columns", "fill")]
        counts = [len(table) for table in tables]
        return [
            at[one.reads[0]], at[one.makes], *places, *counts, rows, columns, of.padded // 16,
            *steps,
        ]  # fmt: skip

    own = dict(zip(("images", "rows", "columns", "fill"), (*tables, fill), strict=True))
    return Operation("images_take", [x], y, slots, [node], {**own})


def _channels(node: Node, table: np.ndarray, given: float, of: Any, made: Any) -> Operation:
    def slots(one: Operation, at: Addresses) -> list[Any]:
        rows = of.images * of.pixels
        return [
            at[one.reads[0]], at[one.makes], at.own["table"], given, rows, made.channels,
            of.pixel_bytes, made.pixel_bytes,
        ]  # fmt: skip

    own = {"table": table.astype(np.int32)}
    return Operation("rows_take", [node.inputs[0]], node.outputs[0], slots, [node], {**own})


def _given(graph: Graph, node: Node, at: int, attribute: str) -> np.ndarray | None:
    """Whole numbers of an input or, in older files, of an attribute; None: not known, or none."""
    name = named(node.inputs, at)
    if name:
        return graph.constants.array(name).reshape(-1) if name in graph.constants else None
    found = node.attribute(attribute)
    return None if found is None else np.asarray(found)


def _axes(given: np.ndarray | None, count: int, rank: int) -> Sequence[int]:
    return range(count) if given is None else [int(axis) % rank for axis in given]


def _is_unknown(graph: Graph, node: Node, at: int) -> bool:
    name = named(node.inputs, at)
    return bool(name) and name not in graph.constants


def _pad(graph: Graph, node: Node) -> Operation | None:
    shape, pads = graph.shape(node.inputs[0]), _given(graph, node, 1, "pads")
    mode = _PAD_MODES.get(node.attribute("mode", b"constant"))
    if not shape or pads is None or mode is None or max(shape) > MOST_PLACES:
        return None
    if _is_unknown(graph, node, 2) or _is_unknown(graph, node, 3) or (pads < 0).any():
        return None
    value = _given(graph, node, 2, "value")
    axes = _axes(_given(graph, node, 3, ""), len(pads) // 2, len(shape))
    places: Places = {}
    for i, axis in enumerate(axes):
        pair = int(pads[i]), int(pads[i + len(pads) // 2])
        size = shape[axis]
        if (mode == "reflect" and max(pair) >= size) or sum(pair) > MOST_PADS:
            return None  # libraries refuse it
        if max(pair) > MOST_PLACES:
            return None
        more = {"constant_values": NOWHERE} if mode == "constant" else {}
        places[axis] = np.pad(np.arange(size), pair, mode, **more)  # type: ignore[call-overload]
    return taken(graph, node, places, 0.0 if value is None else float(value.reshape(-1)[0]))


def places_of_slice(graph: Graph, node: Node) -> Places | None:
    """What a Slice takes of each dimension; None: that is not known, or nothing."""
    shape = graph.shape(node.inputs[0])
    if not shape or any(_is_unknown(graph, node, i) for i in range(1, 5)):
        return None
    if max(shape) > MOST_PLACES:
        return None
    starts, ends = _given(graph, node, 1, "starts"), _given(graph, node, 2, "ends")
    if starts is None or ends is None:
        return None
    axes = _axes(_given(graph, node, 3, "axes"), len(starts), len(shape))
    steps = _given(graph, node, 4, "")
    places: Places = {}
    for i, axis in enumerate(axes):
        step = 1 if steps is None else int(steps[i])
        if step == 0:
            return None
        places[axis] = _between(int(starts[i]), int(ends[i]), step, shape[axis])
        if not len(places[axis]):
            return None
    return places


def _slice(graph: Graph, node: Node) -> Operation | None:
    places, shape = places_of_slice(graph, node), graph.shape(node.inputs[0])
    if places is None or shape is None:
        return None
    changed = [axis for axis, at in places.items() if not np.array_equal(at, range(shape[axis]))]
    channels = channel_axis(graph, node.inputs[0])
    if changed == [channels] and (np.diff(places[channels]) == 1).all():
        return part(graph, node, node.outputs[0], int(places[channels][0]))
    return taken(graph, node, places)


def _between(start: int, end: int, step: int, size: int) -> np.ndarray:
    """Elements of a dimension as Slice takes them: what is below 0 counts from the end."""
    start, end = (at + size if at < 0 else at for at in (start, end))
    low, high = (0, size) if step > 0 else (-1, size - 1)
    return np.arange(min(max(start, low), high), min(max(end, low), high), step)


def rows_by_number(graph: Graph, node: Node) -> Operation | None:
    """Gather of a value by constant numbers; None: by others, or of numbers in several rows."""
    x, ids = node.inputs
    shape, of = graph.shape(x), graph.constants.type(ids) if ids in graph.constants else None
    if not shape or of is None or of.shape is None or len(of.shape) > 1:
        return None
    axis = node.attribute("axis", 0) % len(shape)
    at = graph.constants.array(ids)
    if ((at < -shape[axis]) | (at >= shape[axis])).any():
        return None  # the host says so
    at = np.where(at < 0, at + shape[axis], at)
    gone = axis if at.ndim == 0 else None
    return taken(graph, node, {axis: at.reshape(-1)}, gone=gone)


OPERATORS = {"Pad": _pad, "Slice": _slice}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Slice": "along channels, or of pixels, with any steps",
    "Pad": "constant, reflect, edge, wrap; of channels alone, or of others",
}
