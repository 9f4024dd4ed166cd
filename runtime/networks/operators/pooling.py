"""MaxPool and AveragePool of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.kernels.geometry import Geometry
from headrace.kernels.image_operators import MAXIMUM, MEAN, MEAN_WITH_PADS
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, Slots, Windows, image_of
from headrace.networks.operators.convolution import pads_before


def _pool(graph: Graph, node: Node) -> Operation | None:
    x = node.inputs[0]
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    taps = node.attribute("kernel_shape", [])
    if read is None or written is None or x in graph.constants or any(node.outputs[1:]):
        return None
    if len(taps) != 2 or len(graph.shape(x) or ()) != 4:
        return None
    what = MAXIMUM
    if node.op == "AveragePool":
        what = MEAN_WITH_PADS if node.attribute("count_include_pad", 0) else MEAN
    if node.attribute("ceil_mode", 0) and what == MEAN_WITH_PADS:
        return None  # libraries disagree about what lies behind the pads
    strides = tuple(node.attribute("strides", [1, 1]))
    dilations = tuple(node.attribute("dilations", [1, 1]))
    same = node.attribute("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")
    if same and set(dilations) != {1}:
        return None  # libraries disagree about the pads
    pads = pads_before(node, read, written, tuple(taps), strides, dilations)
    sizes = (read.height, read.width), (written.height, written.width)
    for along in zip(*sizes, taps, strides, pads, dilations, strict=True):
        if not _all_see(*along):
            return None  # not all count windows of nothing, or agree what is the largest of it
    geometry = Geometry(
        read.images, (read.height, read.width), (written.height, written.width),
        (taps[0], taps[1]), (strides[0], strides[1]), pads, (dilations[0], dilations[1]),
    )  # fmt: skip

    def part(geometry: Geometry) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            steps = one.step(one.reads[0], read), one.step(one.makes, written)
            head = [at[one.reads[0]], at[one.makes], read.padded // 16, what, 0, 0, 0, 0]
            return [*head, *geometry.slots(*steps)]

        return slots

    return Operation(
        "images_pool", [x], node.outputs[0], part(geometry), [node],
        windows=Windows(geometry, part),
    )  # fmt: skip


_MOST_TAPS = 1 << 20  # of all windows along one dimension


def _all_see(size: int, count: int, taps: int, stride: int, before: int, apart: int) -> bool:
    """Whether each window along one dimension has a tap in the image, as far as it is looked at."""
    if count * taps > _MOST_TAPS:
        return False
    at = np.arange(count)[:, None] * stride - before + np.arange(taps) * apart
    return bool(((at >= 0) & (at < size)).any(1).all())


OPERATORS = {"MaxPool": _pool, "AveragePool": _pool}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "MaxPool, AveragePool": (
        "without indices; with `ceil_mode` not where pads count. A window with NaN gives NaN, "
        "where onnxruntime's result depends on where in the window that is"
    ),
}
