"""headrace.Frames: a Conv of one channel and one row, without pads, as a product.

A pixel that is written reads neighbouring samples: as many channels of a pixel as there are taps,
and the next pixel begins a stride further, within them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.kernels.convolution import tiled_weights
from headrace.kernels.geometry import GEOMETRY, Geometry
from headrace.kernels.groups import Groups, one_group
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import PADDED, Addresses, Operation, Weight, image_of
from headrace.networks.operators.convolution import tiled_convolution
from headrace.networks.quantisation import named

_READ_BYTES = GEOMETRY + 13  # slot: between pixels that are read


def _frames(graph: Graph, node: Node) -> Operation | None:
    (x, name), bias_name, y = node.inputs[:2], named(node.inputs, 2), node.outputs[0]
    read, written = image_of(graph, x), image_of(graph, y)
    constant = name in graph.constants and (not bias_name or bias_name in graph.constants)
    if read is None or written is None or x in graph.constants or not constant:
        return None
    shape = graph.constants.type(name).shape or ()
    if x in graph.channels_first or y not in graph.channels_first or len(shape) != 3:
        return None
    (taps, stride), count = (shape[2], node.attribute("strides", [1])[0]), written.width
    if stride < 1 or read.images != 1 or (count - 1) * stride + taps > read.channels:
        return None
    bias = np.zeros(written.padded, np.float32)
    if bias_name:
        bias[: written.channels] = graph.constants.array(bias_name)

    def tiled() -> np.ndarray:
        return tiled_weights(graph.constants.array(name).reshape(-1, taps).T[None, None])

    geometry = Geometry(1, (1, count), (1, count), (1, 1))

    def layout(out_step: int) -> tuple[Geometry, int, int, Groups]:
        return geometry, out_step, taps, one_group(written.padded // PADDED, geometry, out_step)

    key = graph.constants.identity(name)
    weight = Weight(4 * taps * written.padded, tiled, None if key is None else ("frames", key))
    made = tiled_convolution(
        node, (read, written), weight, bias, layout, macs=count * taps * written.channels
    )
    of_pixels = made.slots

    def slots(one: Operation, at: Addresses) -> list[Any]:
        found = of_pixels(one, at)
        found[_READ_BYTES] = 4 * stride
        return found

    made.slots = slots
    return made


OPERATORS = {"headrace.Frames": _frames}
