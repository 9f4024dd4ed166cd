"""Quantised images: from and to numbers, sums of two, means and bounds."""

from __future__ import annotations

from typing import Any

from headrace.kernels.geometry import Geometry
from headrace.kernels.requantise import GROUP, Quantised, rounding_slots
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    Addresses,
    Image,
    Operation,
    Planes,
    Slots,
    Windows,
    bytes_of,
    image_of,
    pixelwise,
)
from headrace.networks.operators.quantised import THIN
from headrace.networks.quantisation import added, elem_type, named, quantisation

# Without one of them in the graph, what is quantised is better left to who computes the rest.
_INTEGERS = (
    "QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearGlobalAveragePool",
)  # fmt: skip


def has_integers(graph: Graph) -> bool:
    """Whether an operator of integers is in a graph: what lies between them pays then, too."""
    return any(node.op in _INTEGERS for node in graph.nodes)


def _quantise(graph: Graph, node: Node) -> Operation | None:
    x, y = node.inputs[0], node.outputs[0]
    if not has_integers(graph):
        return None
    read, written = image_of(graph, x), bytes_of(graph, y)
    to = quantisation(graph, node.inputs[1], named(node.inputs, 2), elem_type(graph, y))
    if read is None or written is None or to is None or x in graph.constants:
        return None

    def inside(geometry: Geometry) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            return [
                at[one.reads[0]], at[one.makes], geometry.pixels, read.padded, written.pixel_bytes,
                to.scale, *rounding_slots(to),
            ]  # fmt: skip

        return slots

    def outside(planes: Planes) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            return [
                at[x] + planes.begin, at[one.makes], *planes.slots(), written.pixel_bytes, to.scale,
                *rounding_slots(to),
            ]  # fmt: skip

        return slots

    windows = Windows(pixelwise(read), inside)
    return Operation(
        "images_from_floats", [x], y, inside(windows.geometry), [node],
        at_border=("images_quantise", outside), windows=windows,
    )  # fmt: skip


def _dequantise(graph: Graph, node: Node) -> Operation | None:
    x, y = node.inputs[0], node.outputs[0]
    if not has_integers(graph):
        return None
    read, written = bytes_of(graph, x), image_of(graph, y)
    of = quantisation(graph, node.inputs[1], named(node.inputs, 2), elem_type(graph, x))
    if read is None or written is None or of is None or x in graph.constants:
        return None

    def inside(geometry: Geometry) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            sizes = [geometry.pixels, read.padded, read.pixel_bytes]
            return [at[one.reads[0]], at[one.makes], *sizes, of.scale, of.zero]

        return slots

    def outside(planes: Planes) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            sizes = [read.images, read.channels, read.pixels, read.pixel_bytes]
            return [at[x], at[y], *sizes, of.scale, of.zero]

        return slots

    windows = Windows(pixelwise(read), inside)
    return Operation(
        "images_to_floats", [x], y, inside(windows.geometry), [node],
        at_border=("images_dequantise", outside), windows=windows,
    )  # fmt: skip


def _sum(
    node: Node, names: list[str], image: Image, of: Quantised, other: Quantised, to: Quantised
) -> Operation:
    """The operation of one or two values that lie as their sum does."""

    def part(geometry: Geometry) -> Slots:
        # Of less there is no vector; the bytes behind it are nobody else's (`lifetimes.ALIGNED`).
        n_bytes = max(GROUP, geometry.pixels * image.pixel_bytes)

        def slots(one: Operation, at: Addresses) -> list[Any]:
            a, b = (*(at[name] for name in one.reads), 0)[:2]
            return [
                a, b, at[one.makes], n_bytes, of.scale, of.zero, other.scale, other.zero, to.scale,
                *rounding_slots(to),
            ]  # fmt: skip

        return slots

    windows = Windows(pixelwise(image), part)
    y = node.outputs[0]
    return Operation("images_add_u8", names, y, part(windows.geometry), [node], windows=windows)


def _add(graph: Graph, node: Node) -> Operation | None:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale = node.inputs[:7]
    y = node.outputs[0]
    image = bytes_of(graph, a)
    same = graph.shape(a) == graph.shape(b) == graph.shape(y)
    found = (
        quantisation(graph, a_scale, a_zero, elem_type(graph, a)),
        quantisation(graph, b_scale, b_zero, elem_type(graph, b)),
        quantisation(graph, y_scale, named(node.inputs, 7), elem_type(graph, y)),
    )
    if image is None or not same:
        return None
    if a in graph.constants or b in graph.constants:
        return None
    of, other, to = found
    if of is None or other is None or to is None:
        return None
    return _sum(node, [a, b], image, of, other, to)


def unchanged(graph: Graph, node: Node, least: int = 0, most: int = 255) -> Operation | None:
    """An operation that gives the bytes as they are, but for bounds (with what int8 has added)."""
    x, y = node.inputs[0], node.outputs[0]
    image = bytes_of(graph, x)
    if image is None or image != bytes_of(graph, y) or x in graph.constants:
        return None
    if least > most:
        return None
    plain = Quantised(1.0, 0)
    return _sum(node, [x], image, plain, plain, Quantised(1.0, 0, least, most))


def clip(graph: Graph, node: Node) -> Operation | None:
    """Clip of bytes with constant bounds."""
    bounds = [0, 255]
    more = added(elem_type(graph, node.inputs[0]))
    for i in (1, 2):
        name = named(node.inputs, i)
        if name and name not in graph.constants:
            return None
        if name:
            bounds[i - 1] = int(graph.constants.array(name).reshape(-1)[0]) + more
    return unchanged(graph, node, *bounds)


def _global_average(graph: Graph, node: Node) -> Operation | None:
    x, x_scale, x_zero, y_scale, y_zero = node.inputs[:5]
    y = node.outputs[0]
    read, written = bytes_of(graph, x), bytes_of(graph, y)
    of = quantisation(graph, x_scale, x_zero, elem_type(graph, x))
    to = quantisation(graph, y_scale, y_zero, elem_type(graph, y))
    if read is None or written is None or of is None or to is None or read.channels <= THIN:
        return None
    if len(graph.shape(x) or ()) != 4 or node.attribute("channels_last", 0):
        return None
    scale = of.scale / read.pixels / to.scale

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[x], at[y], read.images, read.pixels, read.padded, read.pixel_bytes,
            written.pixel_bytes, of.zero, scale, 0, *rounding_slots(to),
        ]  # fmt: skip

    return Operation("images_mean_u8", [x], y, slots, [node])


OPERATORS = {
    "QuantizeLinear": _quantise, "DequantizeLinear": _dequantise,
    "com.microsoft.QuantizeLinear": _quantise, "com.microsoft.DequantizeLinear": _dequantise,
    "com.microsoft.QLinearAdd": _add,
    "com.microsoft.QLinearGlobalAveragePool": _global_average,
}  # fmt: skip
# For the table in docs/onnx.md: which of them.
WHICH = {
    "QLinearAdd, QLinearGlobalAveragePool": "of two values of the same shape; of all pixels",
    "QuantizeLinear, DequantizeLinear": (
        "with one scale, in networks that have one of those; other operators of these take "
        "dequantised weights as float32"
    ),
}
