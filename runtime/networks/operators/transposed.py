"""ConvTranspose of images with constant float32 weights.

What lies at one place of the strides is a convolution of what is read: each place is a group of
tiles that writes there, or some channels of a pixel that is spread later (Shi et al. 2016,
arXiv:1609.07009, "Is the deconvolution layer the same as a convolutional layer?").
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

from headrace.kernels.convolution import tiled_weights
from headrace.kernels.geometry import Geometry
from headrace.kernels.groups import Groups, one_group
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import PADDED, Addresses, Image, Operation, Weight, image_of
from headrace.networks.operators.convolution import tiled_convolution


def _transposed(graph: Graph, node: Node) -> Operation | None:
    x, name = node.inputs[:2]
    bias_name = node.inputs[2] if len(node.inputs) > 2 else ""
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    constant = name in graph.constants and (not bias_name or bias_name in graph.constants)
    shape = graph.constants.type(name).shape if constant else None
    if read is None or written is None or shape is None or len(shape) != 4 or x in graph.constants:
        return None
    if node.attribute("group", 1) != 1 or set(node.attribute("dilations", [1])) != {1}:
        return None
    if node.attribute("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    strides = tuple(node.attribute("strides", [1, 1]))
    if (written.height, written.width) != (read.height * strides[0], read.width * strides[1]):
        return None
    pads = node.attribute("pads", [0, 0, 0, 0])
    if node.attribute("output_shape") is not None:
        return None
    down, across = (_taps(shape[2 + i], strides[i], pads[i]) for i in (0, 1))
    taps = len(down[0]), len(across[0])
    n_tiles = written.padded // PADDED
    places = strides[0] * strides[1]
    bias = np.zeros((places, written.padded), np.float32)
    if bias_name:
        bias[:, : written.channels] = graph.constants.array(bias_name)

    def tiled() -> np.ndarray:
        w = graph.constants.array(name).transpose(2, 3, 0, 1)
        w = np.pad(w, ((0, 1), (0, 1), (0, 0), (0, 0)))  # -1: a tap that is none
        parts = [w[np.ix_(rows, columns)] for rows, columns in product(down, across)]
        if few:
            return tiled_weights(np.concatenate(parts, -1))
        return np.concatenate([tiled_weights(part) for part in parts])

    size = (read.height, read.width)
    begin = _begin(shape[2], strides[0], pads[0]), _begin(shape[3], strides[1], pads[1])
    geometry = Geometry(read.images, size, size, taps, pads=(-begin[0], -begin[1]))

    def layout(step: int) -> tuple[Geometry, int, int, Groups]:
        row = written.width * step
        groups = Groups(n_tiles, 0, strides[1], (step, row), strides[0] * row)
        return geometry, strides[1] * step, read.channels, groups

    key = graph.constants.identity(name)
    few = written.channels <= PADDED // 2
    width = places * written.padded
    if few:
        width = -(-places * written.channels // PADDED) * PADDED
    n_bytes = 4 * math.prod(taps) * read.channels * width
    weight = Weight(n_bytes, tiled, None if key is None else ("transposed", key, strides, *pads))
    macs = read.images * read.pixels * math.prod(shape)
    if few:
        return _few(node, (read, written), geometry, weight, bias, strides)
    made = tiled_convolution(node, (read, written), weight, bias.reshape(-1), layout, macs)
    made.spreads = True
    return made


def _few(
    node: Node, images: tuple[Image, Image], geometry: Geometry, w: Weight, bias: np.ndarray,
    strides: tuple[int, ...],
) -> Operation:  # fmt: skip
    """Few channels: those of all places are channels of one pixel, which is then spread."""
    read, written = images
    inner = Image(read.images, read.height, read.width, len(bias) * written.channels)

    def there(values: np.ndarray) -> np.ndarray:
        """Of channels that are written, for all channels of `inner`."""
        found = np.ones(inner.padded, np.float32)
        found[: inner.channels] = np.tile(values[: written.channels], len(bias))
        return found

    def layout(step: int) -> tuple[Geometry, int, int, Groups]:
        return geometry, step, read.channels, one_group(inner.padded // PADDED, geometry, step)

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[one.reads[0]], at[one.makes], read.images, read.height, read.width, *strides,
            written.channels, one.step(one.reads[0], inner), one.step(one.makes, written),
        ]  # fmt: skip

    macs = inner.images * inner.pixels * inner.channels * math.prod(geometry.taps) * read.channels
    made = tiled_convolution(node, (read, inner), w, there(bias[0]), layout, macs)
    made.makes, made.image, made.nodes = f"{node.outputs[0]}/headrace/places", inner, []
    spread = Operation("images_spread", [made.makes], node.outputs[0], slots, [node])
    spread.source = made, there
    made.also = [spread]
    return made


def _reach(taps: int, stride: int, pad: int) -> list[list[tuple[int, int]]]:
    """For each place of a stride, (pixels from the one at its begin, tap) of what it is made of."""
    return [
        [((at + pad - tap) // stride, tap) for tap in range(taps) if (at + pad - tap) % stride == 0]
        for at in range(stride)
    ]


def _begin(taps: int, stride: int, pad: int) -> int:
    return min((where for one in _reach(taps, stride, pad) for where, _ in one), default=0)


def _taps(taps: int, stride: int, pad: int) -> list[list[int]]:
    """For each place of a stride, the tap for each pixel of what all places read; -1: none."""
    reach = _reach(taps, stride, pad)
    begin = _begin(taps, stride, pad)
    end = max((where for one in reach for where, _ in one), default=0)
    found = [[-1] * (end - begin + 1) for _ in reach]
    for at, one in enumerate(reach):
        for where, tap in one:
            found[at][where - begin] = tap
    return found


OPERATORS = {"ConvTranspose": _transposed}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "ConvTranspose": (
        "as Conv, of one group, where the result is as many times as large as strides say"
    ),
}
