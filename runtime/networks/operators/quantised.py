"""QLinearConv, QGemm (also of batches of rows) and QLinearMatMul: sums of quantised products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.kernels import convolution_u8, depthwise_u8, weights_u8
from headrace.kernels.geometry import Geometry
from headrace.kernels.requantise import GROUP, Quantised, folded_bias, rounding_slots, scales
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    PADDED,
    Addresses,
    Cut,
    Image,
    Operation,
    Slots,
    Weight,
    Windows,
    bytes_of,
    image_of,
)
from headrace.networks.operators.convolution import pads_before
from headrace.networks.quantisation import elem_type, int8_weights, named, quantisation

THIN = 4  # channels of images whose pixels only a network's input has so close together


def _conv(graph: Graph, node: Node) -> Operation | None:
    x, x_scale, x_zero, w_name, w_scale, w_zero, y_scale, y_zero = node.inputs[:8]
    read, written = bytes_of(graph, x), bytes_of(graph, node.outputs[0])
    of = quantisation(graph, x_scale, x_zero, elem_type(graph, x))
    to = quantisation(graph, y_scale, y_zero, elem_type(graph, node.outputs[0]))
    weights = int8_weights(graph, w_name, w_scale, w_zero, 0)
    if read is None or written is None or of is None or to is None or weights is None:
        return None
    w, factors = weights
    bias = _bias(graph, named(node.inputs, 8), written.channels)
    if w.ndim != 4 or bias is None:
        return None
    groups = node.attribute("group", 1)
    depthwise = groups == read.channels == written.channels and groups > THIN
    if (groups != 1 and not depthwise) or written.channels <= THIN:
        return None
    strides = tuple(node.attribute("strides", [1, 1]))
    dilations = tuple(node.attribute("dilations", [1, 1]))
    pads = pads_before(node, read, written, w.shape[2:], strides, dilations)
    geometry = Geometry(
        read.images, (read.height, read.width), (written.height, written.width),
        (w.shape[2], w.shape[3]), (strides[0], strides[1]), pads, (dilations[0], dilations[1]),
    )  # fmt: skip
    if not _stay_integers(w, factors, bias, of, to):
        return None
    taps = w.transpose(2, 3, 1, 0)  # [down, across, read, written]
    if depthwise:
        return _depthwise(node, geometry, written, taps[:, :, 0], factors, bias, of, to)

    def again() -> np.ndarray:
        found = int8_weights(graph, w_name, w_scale, w_zero, 0)
        assert found is not None
        return found[0].transpose(2, 3, 1, 0)

    key = _key(graph, w_name, w_zero)
    return _dense(node, geometry, read, written, taps, factors, bias, of, to, key, again)


def _dense(
    node: Node, geometry: Geometry, read: Image, written: Image, w: np.ndarray,
    factors: np.ndarray, bias: np.ndarray, of: Quantised, to: Quantised | None, key: Any,
    again: Callable[[], np.ndarray], summands: np.ndarray | None = None,
) -> Operation:  # fmt: skip
    """The operation of weights [down, across, read, written]; without `to` it gives float32.

    Args:
        summands: of channels, which are added to float32 results; None: nothing is.
        key: what tells the weights from others; None: nothing does.
        again: gives them once more: they are not held meanwhile.
    """
    floats = to is None
    sums = w.sum((0, 1, 2), dtype=np.int64)
    tails = weights_u8.tails(
        folded_bias(bias, sums, of.zero), scales(of, factors, 1.0 if to is None else to.scale),
        sums, floats, summands,
    )  # fmt: skip
    zero, least, most = rounding_slots(to or of)
    quads = -(-w.shape[2] // weights_u8.QUAD)
    n_bytes = math.prod(w.shape[:2]) * quads * weights_u8.QUAD * written.padded
    size = w.size

    def part(geometry: Geometry) -> Slots:
        tail = geometry.flat().slots(read.pixel_bytes, written.pixel_bytes)
        # Late layers have more weights than pixels: each thread reads some of them only.
        share_tiles = int(size > geometry.pixels * written.pixel_bytes)

        def slots(one: Operation, at: Addresses) -> list[Any]:
            return [
                at.own["weights"], at[one.reads[0]], at[one.makes], at.own["tails"],
                at.own["outside"], quads, written.padded // PADDED, most, *tail, zero, least,
                int(floats), share_tiles,
            ]  # fmt: skip

        return slots

    own: dict[str, np.ndarray | Weight] = {
        "weights": Weight(
            n_bytes, lambda: weights_u8.tiled_weights(again(), floats),
            None if key is None else ("u8", key, floats), planned_by=True,
        ),
        "tails": tails,
        "outside": np.full(-(-read.pixel_bytes // 64) * 64, of.zero, np.uint8),
    }  # fmt: skip
    macs = written.images * written.pixels * math.prod(w.shape)
    return Operation(
        "convolution_u8", [node.inputs[0]], node.outputs[0], part(geometry), [node], own, macs=macs,
        windows=Windows(geometry, part),
        cut=Cut(written.padded // PADDED, convolution_u8.some_tiles),
    )  # fmt: skip


def _depthwise(
    node: Node, geometry: Geometry, written: Image, w: np.ndarray, factors: np.ndarray,
    bias: np.ndarray, of: Quantised, to: Quantised,
) -> Operation:  # fmt: skip
    """The operation of weights [down, across, channels]."""
    channels = written.padded
    sums = w.astype(np.int64).sum((0, 1))
    tails = depthwise_u8.tails(
        folded_bias(bias, sums, of.zero), scales(of, factors, to.scale), sums, channels
    )
    count, fours = depthwise_u8.placing(depthwise_u8.reach(geometry), geometry.strides[1])
    zero, least, most = rounding_slots(to)

    def part(geometry: Geometry) -> Slots:
        tail = geometry.slots(written.pixel_bytes, written.pixel_bytes)

        def slots(one: Operation, at: Addresses) -> list[Any]:
            return [
                at.own["weights"], at[one.reads[0]], at[one.makes], at.own["tails"],
                at.own["outside"], channels, count, most, *tail, zero, least, fours,
            ]  # fmt: skip

        return slots

    own: dict[str, np.ndarray | Weight] = {
        "weights": depthwise_u8.placed_weights(w, channels, geometry), "tails": tails,
        "outside": np.full(channels + GROUP, of.zero, np.uint8),
    }  # fmt: skip
    macs = written.images * written.pixels * math.prod(w.shape)
    return Operation(
        "depthwise_u8", [node.inputs[0]], node.outputs[0], part(geometry), [node], own, macs=macs,
        windows=Windows(geometry, part),
    )  # fmt: skip


def _stay_integers(
    w: np.ndarray, factors: np.ndarray, bias: np.ndarray, of: Quantised, to: Quantised
) -> bool:
    """Whether sums, times their scales, are integers of 32 bits again; w: channels first."""
    sizes = np.abs(w.reshape(len(w), -1)).sum(1, dtype=np.int64) * 255.0
    largest = np.minimum(sizes + np.abs(bias), 2.0**31)
    return bool((largest * scales(of, factors, to.scale) < 2.0**31).all())


def _bias(graph: Graph, name: str, channels: int) -> np.ndarray | None:
    """int32 for each channel; None: it is no constant of that size."""
    if not name:
        return np.zeros(channels, np.int32)
    if name not in graph.constants:
        return None
    found = graph.constants.array(name).reshape(-1)
    if found.dtype != np.int32 or found.size not in (1, channels):
        return None
    return np.broadcast_to(found, channels)


def _gemm(graph: Graph, node: Node) -> Operation | None:
    if node.attribute("transA", 0) or node.attribute("alpha", 1.0) != 1.0:
        return None
    bias, y_scale, y_zero = (named(node.inputs, i) for i in (6, 7, 8))
    transposed = bool(node.attribute("transB", 0))
    return _product(graph, node, transposed, bias, y_scale, y_zero)


def _matmul(graph: Graph, node: Node) -> Operation | None:
    return _product(graph, node, False, "", node.inputs[6], node.inputs[7])


def _product(
    graph: Graph, node: Node, transposed: bool, bias_name: str, y_scale: str, y_zero: str
) -> Operation | None:
    x, x_scale, x_zero, w_name, w_scale, w_zero = node.inputs[:6]
    y = node.outputs[0]
    read, written = bytes_of(graph, x), (bytes_of if y_scale else image_of)(graph, y)
    of = quantisation(graph, x_scale, x_zero, elem_type(graph, x))
    to = quantisation(graph, y_scale, y_zero, elem_type(graph, y)) if y_scale else None
    weights = int8_weights(graph, w_name, w_scale, w_zero, 0 if transposed else 1)
    if read is None or written is None or of is None or weights is None:
        return None
    w, factors = weights
    if w.ndim != 2 or len(graph.shape(x) or ()) not in (2, 3) or (y_scale and to is None):
        return None
    if {x, y} & graph.channels_first or read.channels != w.shape[int(transposed)]:
        return None
    summands = None
    if node.domain == "headrace":  # a bias in float32
        summands = graph.constants.array(bias_name).reshape(-1)
        if summands.dtype != np.float32 or summands.size != written.channels:
            return None
    bias = _bias(graph, "" if summands is not None else bias_name, written.channels)
    if bias is None or read.images != written.images or (to and written.channels <= THIN):
        return None
    columns = w.T if transposed else w
    if to is not None and not _stay_integers(columns.T, factors, bias, of, to):
        return None
    matrix = columns[None, None]

    def again() -> np.ndarray:
        found = int8_weights(graph, w_name, w_scale, w_zero, 0 if transposed else 1)
        assert found is not None
        return (found[0].T if transposed else found[0])[None, None]

    key = _key(graph, w_name, w_zero)
    geometry = Geometry(1, (1, read.images), (1, read.images), (1, 1))
    rows = [Image(1, 1, read.images, v.channels, v.item) for v in (read, written)]
    key = None if key is None else (*key, transposed)
    return _dense(
        node, geometry, rows[0], rows[1], matrix, factors, bias, of, to, key, again, summands
    )


def _key(graph: Graph, *names: str) -> Any:
    """What tells int8 weights less their zero points from others; None: nothing does."""
    found = tuple(graph.constants.identity(name) for name in names if name)
    return None if None in found else found


OPERATORS = {
    "QLinearConv": _conv, "QLinearMatMul": _matmul, "com.microsoft.QGemm": _gemm,
    "headrace.QGemm": _gemm,
}  # fmt: skip
# For the table in docs/onnx.md: which of them.
WHICH = {
    "QLinearConv, QLinearMatMul, QGemm": (
        "of uint8 or int8 with one scale, constant weights in -127..127 with a scale for each "
        "channel; dense and depthwise as above; QGemm also to float32 (with a float32 bias, "
        "as of MatMul and Add), and of batches of rows"
    ),
}
