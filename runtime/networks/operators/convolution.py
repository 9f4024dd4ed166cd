"""Conv: dense, depthwise and in groups, of images with constant float32 weights.

Of one dimension, it is that of images of one row (`headrace.networks.channels_first`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from headrace.kernels.convolution import some_tiles, tiled_weights
from headrace.kernels.ending import Ending
from headrace.kernels.geometry import Geometry
from headrace.kernels.groups import Groups, one_group
from headrace.networks.graph import Constants, Graph, Node
from headrace.networks.operation import (
    NOTHING,
    PADDED,
    Addresses,
    Cut,
    Image,
    Operation,
    Slots,
    Weight,
    Windows,
    image_of,
)
from headrace.networks.operators.sparse_product import sparse_product
from headrace.networks.quantisation import named

# Weights [down, across, read, written] in parts, with the first channels read and written; a part
# has all channels that are read, or all that are written and a single tap.
Runs = Callable[[], Iterator[tuple[int, int, np.ndarray]]]


def _conv(graph: Graph, node: Node) -> Operation | None:
    x, name = node.inputs[0], node.inputs[1]
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    bias_name = named(node.inputs, 2)
    constant = name in graph.constants and (not bias_name or bias_name in graph.constants)
    shape = graph.constants.type(name).shape if constant else None
    if read is None or written is None or shape is None or len(shape) not in (3, 4):
        return None
    if len(shape) == 3 and not graph.channels_first.issuperset((x, node.outputs[0])):
        return None
    one_row = (1,) * (4 - len(shape))  # what rows are to what is given of columns
    shape = (*shape[:2], *one_row, *shape[2:])
    groups = node.attribute("group", 1)
    if (read.channels, written.channels) != (shape[1] * groups, shape[0]):
        return None  # the host says so
    depthwise = groups == read.channels == written.channels and groups > 1
    strides = (*one_row, *node.attribute("strides", [1] * (2 - len(one_row))))
    dilations = (*one_row, *node.attribute("dilations", [1] * (2 - len(one_row))))
    pads = pads_before(node, read, written, shape[2:], strides, dilations)
    geometry = Geometry(
        read.images, (read.height, read.width), (written.height, written.width),
        (shape[2], shape[3]), (strides[0], strides[1]), pads, (dilations[0], dilations[1]),
    )  # fmt: skip
    bias = np.zeros(written.padded, np.float32)
    if bias_name:
        bias[: written.channels] = graph.constants.array(bias_name)

    def weights() -> np.ndarray:  # [down, across, read, written]
        return graph.constants.array(name).reshape(shape).transpose(2, 3, 1, 0)

    def runs() -> Iterator[tuple[int, int, np.ndarray]]:
        for first, rows in graph.constants.rows(name, PADDED):
            yield 0, first, rows.reshape(-1, *shape[1:]).transpose(2, 3, 1, 0)

    channels = (shape[1], shape[0])
    key = graph.constants.identity(name)
    if groups > 1 and not depthwise:
        return grouped(node, geometry, (read, written), groups, weights, key, bias)
    return convolution(
        node, geometry, (read, written), channels, weights, key, bias, graph.constants,
        depthwise=depthwise, runs=runs if graph.constants.in_runs(name) else None,
    )  # fmt: skip


def grouped(
    node: Node, geometry: Geometry, images: tuple[Image, Image], groups: int,
    w: Callable[[], np.ndarray], key: Any, bias: np.ndarray,
) -> Operation:  # fmt: skip
    """The operation of weights [down, across, channels read of a group, channels written].

    As many groups as fill tiles are one block of weights, with zeros between them.
    """
    read, written = images
    each = written.channels // groups
    whole = (n for n in range(1, groups) if groups % n == 0 and n * each % PADDED == 0)
    joined = next(whole, groups)
    taps, n_read = math.prod(geometry.taps), joined * read.channels // groups
    n_tiles = -(-joined * each // PADDED)  # of a block

    def tiled() -> np.ndarray:
        parts = np.split(w(), groups, -1)
        blocks = []
        for first in range(0, groups, joined):
            block = np.zeros((*geometry.taps, n_read, joined * each), np.float32)
            for i in range(joined):
                of = n_read // joined
                rows, columns = slice(i * of, i * of + of), slice(i * each, i * each + each)
                block[:, :, rows, columns] = parts[first + i]
            blocks.append(tiled_weights(block))
        return np.concatenate(blocks)

    def layout(out_step: int) -> tuple[Geometry, int, int, Groups]:
        row = geometry.written[1] * out_step
        apart = (0, n_tiles * 4 * PADDED)
        return geometry, out_step, n_read, Groups(n_tiles, n_read * 4, 1, apart, row)

    macs = written.images * written.pixels * taps * written.channels * read.channels // groups
    n_bytes = 4 * taps * n_read * written.padded
    weight = Weight(n_bytes, tiled, None if key is None else ("groups", groups, key))
    return tiled_convolution(node, images, weight, bias, layout, macs)


def tiled_convolution(
    node: Node, images: tuple[Image, Image], weight: Weight, bias: np.ndarray,
    layout: Callable[[int], tuple[Geometry, int, int, Groups]], macs: int,
) -> Operation:  # fmt: skip
    """The operation of weights as the kernel has them.

    Args:
        layout: for bytes between pixels that are written gives the geometry, bytes between pixels
            that it makes one after the other, channels that a group reads, and the groups.
    """
    read, written = images

    def slots(one: Operation, at: Addresses) -> list[Any]:
        geometry, out_step, n_read, groups = layout(one.step(one.makes, written))
        if one.geometry is not None:
            geometry, n_read = one.geometry
            groups = replace(groups, row=geometry.written[1] * out_step)
        tail = geometry.slots(one.step(one.reads[0], read), out_step)
        ending = ending_of(one, written)
        low, high = ending.bounds()
        return [
            at.own["weights"], at[one.reads[0]], at[one.makes], at.own["bias"],
            0 if one.adds is None else at[one.adds], n_read, bias.size // PADDED, low, *tail, high,
            *ending.slots(), *groups.slots(),
        ]  # fmt: skip

    return Operation(
        "convolution_f32", [node.inputs[0]], node.outputs[0], slots, [node],
        {"weights": weight, "bias": bias}, macs=macs,
    )  # fmt: skip


def convolution(
    node: Node, geometry: Geometry, images: tuple[Image, Image], channels: tuple[int, int],
    w: Callable[[], np.ndarray], key: Any, bias: np.ndarray, constants: Constants, *,
    depthwise: bool = False, runs: Runs | None = None,
) -> Operation:  # fmt: skip
    """The operation of weights [down, across, channels read, channels written].

    Args:
        images: that are read and written.
        channels: of the weights.
        w: gives them.
        key: what tells them from others; None: nothing does.
        constants: of the network.
        runs: gives the weights in parts; None: they can only be had whole.
    """
    read, written = images
    if not depthwise:
        sparse = sparse_product(node, geometry.flat(), images, w, key, bias, constants, runs)
        if sparse is not None:
            return sparse
    taps = math.prod(geometry.taps)
    macs = written.images * written.pixels * taps * math.prod(channels)
    padded = taps * written.padded * (1 if depthwise else channels[0])

    def tiled() -> np.ndarray:
        if not depthwise:
            return tiled_weights(w())
        found = np.zeros((*geometry.taps, written.padded), np.float32)
        found[..., : written.channels] = w()[:, :, 0]
        return found

    kernel = "depthwise_f32" if depthwise else "convolution_f32"
    weight = Weight(
        4 * padded, tiled, None if key is None else (kernel, key),
        None if runs is None or depthwise else lambda: _tiled_runs(runs(), taps * channels[0]),
    )  # fmt: skip
    if not depthwise:
        flat, n_tiles = geometry.flat(), written.padded // PADDED

        def layout(out_step: int) -> tuple[Geometry, int, int, Groups]:
            return flat, out_step, read.channels, one_group(n_tiles, flat, out_step)

        made = tiled_convolution(node, images, weight, bias, layout, macs)
        made.geometry = flat, read.channels
        made.cut = Cut(n_tiles, some_tiles, 2)
        # Its slots go by `made.geometry`.
        made.windows = Windows(geometry, lambda _: made.slots)
        return made

    def part(geometry: Geometry) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            tail = geometry.slots(one.step(one.reads[0], read), one.step(one.makes, written))
            ending = ending_of(one, written)
            low, high = ending.bounds()
            return [
                at.own["weights"], at[one.reads[0]], at[one.makes], at.own["bias"],
                0 if one.adds is None else at[one.adds], written.padded, 0, low, *tail, high,
                *ending.slots(),
            ]  # fmt: skip

        return slots

    return Operation(
        kernel, [node.inputs[0]], node.outputs[0], part(geometry), [node],
        {"weights": weight, "bias": bias}, macs=macs, windows=Windows(geometry, part),
    )  # fmt: skip


def _tiled_runs(
    parts: Iterator[tuple[int, int, np.ndarray]], rows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of weights as the kernel has them, tiles of so many rows of 16, with their places."""
    for read, written, part in parts:
        tiles = tiled_weights(part)
        first = written // PADDED
        if tiles[0].size == rows * PADDED:
            yield 4 * PADDED * rows * first, tiles
            continue
        for i, tile in enumerate(tiles):
            yield 4 * PADDED * (rows * (first + i) + read), tile


def ending_of(one: Operation, written: Image) -> Ending:
    """What a convolution does last."""
    if one.adds is None:
        return Ending(one.least, one.most, one.finish)
    step = one.step(one.adds, written)
    apart = one.kernel != "convolution_f32" or step != one.step(one.makes, written)
    plain = one.finish == NOTHING
    return Ending(one.least, one.most, one.finish, one.late or (plain and apart), step)


def pads_before(
    node: Node, read: Image, written: Image, taps: tuple[int, ...], strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, int]:  # fmt: skip
    """Pads above and to the left.

    Raises:
        ValueError: windows with the size of what is read would leave some of it out, at either end,
            or a window is larger than what is read with its pads.
    """
    auto = node.attribute("auto_pad", b"NOTSET").decode()
    if auto in ("NOTSET", "VALID"):
        pads = node.attribute("pads", [0] * 4) if auto == "NOTSET" else [0] * 4
        pads = pads if len(pads) == 4 else [0, pads[0], 0, pads[1]]
        for i, size in enumerate((read.height, read.width)):
            if (taps[i] - 1) * dilations[i] >= size + pads[i] + pads[i + 2]:
                raise ValueError("a window is larger than all that there is")
        return pads[0], pads[1]
    found = []
    sizes = ((read.height, written.height), (read.width, written.width))
    for i, (size, out) in enumerate(sizes):
        reach = (taps[i] - 1) * dilations[i] + 1
        whole = (out - 1) * strides[i] + reach - size
        if whole < 0 and strides[i] > 1:
            raise ValueError("pads below zero, of which libraries have their own view")
        whole = max(0, whole)
        found.append(whole // 2 if auto == "SAME_UPPER" else whole - whole // 2)
    return found[0], found[1]


OPERATORS = {"Conv": _conv}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Conv": (
        "float32 images, or rows of pixels (one dimension), with constant weights: dense, "
        "depthwise and in groups, any taps, strides, pads and dilations; of the samples of "
        "one channel without pads, windows are read where they lie"
    ),
}
