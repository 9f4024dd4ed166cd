"""Conv: dense and depthwise, of images with constant float32 weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headrace.kernels.convolution import Ending, Geometry, one_group, tiled_weights
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import NOTHING, PADDED, Image, Operation, Weight, image_of


def _conv(graph: Graph, node: Node) -> Operation | None:
    x, name = node.inputs[0], node.inputs[1]
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    bias_name = node.inputs[2] if len(node.inputs) > 2 else ""
    constant = name in graph.constants and (not bias_name or bias_name in graph.constants)
    shape = graph.constants.type(name).shape if constant else None
    if read is None or written is None or shape is None or len(shape) != 4:
        return None
    groups = node.attribute("group", 1)
    depthwise = groups == read.channels == written.channels and groups > 1
    if groups != 1 and not depthwise:
        return None
    strides = tuple(node.attribute("strides", [1, 1]))
    dilations = tuple(node.attribute("dilations", [1, 1]))
    pads = pads_before(node, read, written, shape[2:], strides, dilations)
    geometry = Geometry(
        read.images, (read.height, read.width), (written.height, written.width),
        (shape[2], shape[3]), (strides[0], strides[1]), pads, (dilations[0], dilations[1]),
    )  # fmt: skip
    bias = np.zeros(written.padded, np.float32)
    if bias_name:
        bias[: written.channels] = graph.constants.array(bias_name)

    def weights() -> np.ndarray:  # [down, across, read, written]
        return graph.constants.array(name).transpose(2, 3, 1, 0)

    channels = (shape[1], shape[0])
    key = graph.constants.identity(name)
    return convolution(
        node, geometry, (read, written), channels, weights, key, bias, depthwise=depthwise
    )


def convolution(
    node: Node, geometry: Geometry, images: tuple[Image, Image], channels: tuple[int, int],
    w: Callable[[], np.ndarray], key: Any, bias: np.ndarray, *, depthwise: bool = False,
) -> Operation:  # fmt: skip
    """The operation of weights [down, across, channels read, channels written].

    Args:
        images: that are read and written.
        channels: of the weights.
        w: gives them.
        key: what tells them from others; None: nothing does.
    """
    read, written = images
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
    weight = Weight(4 * padded, tiled, None if key is None else (kernel, key))
    if not depthwise:
        geometry = geometry.flat()
    n_channels = written.padded if depthwise else read.channels

    def slots(one: Operation, at: Mapping[str, int]) -> list[Any]:
        out_step = one.step(one.makes, written)
        tail = geometry.slots(one.step(one.reads[0], read), out_step)
        ending = ending_of(one, written)
        low, high = ending.bounds()
        n_tiles = written.padded // PADDED
        more = [] if depthwise else one_group(n_tiles, geometry, out_step).slots()
        return [
            at["weights"], at[one.reads[0]], at[one.makes], at["bias"],
            0 if one.adds is None else at[one.adds], n_channels, n_tiles, low, *tail, high,
            *ending.slots(), *more,
        ]  # fmt: skip

    return Operation(
        kernel, [node.inputs[0]], node.outputs[0], slots, [node],
        {"weights": weight, "bias": bias}, macs=macs,
    )  # fmt: skip


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
    """Pads above and to the left."""
    auto = node.attribute("auto_pad", b"NOTSET").decode()
    if auto in ("NOTSET", "VALID"):
        pads = node.attribute("pads", [0, 0, 0, 0]) if auto == "NOTSET" else [0, 0]
        return pads[0], pads[1]
    found = []
    sizes = ((read.height, written.height), (read.width, written.width))
    for i, (size, out) in enumerate(sizes):
        reach = (taps[i] - 1) * dilations[i] + 1
        whole = max(0, (out - 1) * strides[i] + reach - size)
        found.append(whole // 2 if auto == "SAME_UPPER" else whole - whole // 2)
    return found[0], found[1]


OPERATORS = {"Conv": _conv}
