"""Resize and Upsample of rows and columns, nearest and linear, as ONNX defines where pixels lie."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, image_of


def _resize(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    mode = node.attribute("mode", b"nearest").decode()
    if read is None or written is None or x in graph.constants or mode not in _MODES:
        return None
    same = (read.images, read.channels) == (written.images, written.channels)
    if len(graph.shape(x) or ()) != 4 or not same or node.attribute("antialias", 0):
        return None
    sizes = (read.height, written.height), (read.width, written.width)
    scales = _scales(graph, node)
    stretched = node.attribute("keep_aspect_ratio_policy", b"stretch") == b"stretch"
    # Of sizes that scales leave as they are, onnxruntime makes a copy, and onnx's reference none.
    as_it_was = all(a == b for a, b in sizes) and any(one not in (None, 1) for one in scales)
    if not stretched or as_it_was:
        return None
    tables = [_table(node, *size, scale) for size, scale in zip(sizes, scales, strict=True)]
    if any(table is None for table in tables):
        return None

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[x], at[one.makes], at.own["rows"], at.own["columns"], read.images, read.height,
            read.width, written.height, written.width, read.padded // 16, one.step(x, read),
            one.step(one.makes, written), int(mode != "nearest"),
        ]  # fmt: skip

    weights: dict[str, Any] = dict(zip(("rows", "columns"), tables, strict=True))
    return Operation("images_resize", [x], node.outputs[0], slots, [node], weights)


_MODES = ("nearest", "linear", "bilinear")
# What is that near to the middle of two pixels is there, but for rounding: as of onnxruntime 1.32.
_TIE = 1e-6


def _scales(graph: Graph, node: Node) -> list[float | None]:
    """Of rows and columns, where the node says so."""
    at = 1 if _old(node) else 2
    name = node.inputs[at] if len(node.inputs) > at else ""
    given: Any = node.attribute("scales")
    if name and name in graph.constants:
        given = graph.constants.array(name)
    if given is None or not len(given):
        return [None, None]
    # Axes in any order; of those that are left out the size stays.
    axes = [int(axis) % 4 for axis in node.attribute("axes") or range(4)]
    of = dict(zip(axes, map(float, given), strict=False))
    return [of.get(axis) for axis in (2, 3)]


def _old(node: Node) -> bool:
    """Whether it is Upsample, or Resize of operator set 10: without attributes of where."""
    return node.op == "Upsample" or len(node.inputs) == 2


def _table(node: Node, size: int, count: int, scale: float | None) -> np.ndarray | None:
    """Which pixels one of `count` is made of: [3, count], see `images_resize`."""
    where = node.attribute("coordinate_transformation_mode", b"half_pixel").decode()
    if _old(node):
        where = "asymmetric"
    # In float32, as other runtimes do: what lies between two pixels is rounded as they round.
    i = np.arange(count, dtype=np.float32)
    ratio, half = np.float32(scale or count / size), np.float32(0.5)
    if where == "asymmetric":
        at = i / ratio
    elif where == "half_pixel":
        at = (i + half) / ratio - half
    elif where == "pytorch_half_pixel":
        at = (i + half) / ratio - half if count > 1 else 0 * i
    elif where == "half_pixel_symmetric":
        middle = half * size * (1 - np.float32(count) / (ratio * np.float32(size)))
        at = (middle + (i + 0.5).astype(np.float64) / ratio - 0.5).astype(np.float32)
    elif where == "align_corners":
        at = i * np.float32(size - 1) / np.float32(count - 1) if count > 1 else 0 * i
    else:
        return None
    share = np.zeros(count)
    if node.attribute("mode", b"nearest").decode() == "nearest":
        rounded = node.attribute("nearest_mode", b"round_prefer_floor").decode()
        if _old(node):
            rounded = "floor" if ratio >= 1 else "ceil"  # as onnxruntime, which alone says so
        near = 0.5 + _TIE
        up, down = np.floor(at.astype(np.float64) + near), np.ceil(at.astype(np.float64) - near)
        turned = {
            "round_prefer_floor": down, "round_prefer_ceil": up,
            "floor": np.floor(at), "ceil": np.ceil(at),
        }.get(rounded)  # fmt: skip
        if turned is None:
            return None
        one = two = turned
    else:
        at = np.clip(at, 0, size - 1)
        one = np.floor(at)
        two, share = one + 1, at - one
    places = [np.clip(p, 0, size - 1).astype(np.int32) for p in (one, two)]
    return np.stack([*places, share.astype(np.float32).view(np.int32)]).view(np.float32)


OPERATORS = {"Resize": _resize, "Upsample": _resize}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Resize, Upsample": (
        "of rows and columns, nearest and linear, to sizes or by scales that change them; no "
        "ratio that is kept"
    ),
}
