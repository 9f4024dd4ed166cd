"""Add, Sub, Mul, Div, Max and Min with a constant of each channel or with another value.

BatchNormalization is a product and a sum with constants.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from headrace.kernels import image_operators as kernels
from headrace.kernels.geometry import Geometry
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    Addresses,
    Image,
    Operation,
    Slots,
    Weight,
    Windows,
    channel_axis,
    image_of,
    pixelwise,
)
from headrace.networks.operators import sums
from headrace.networks.operators.activations import mapped

_CODES = {
    "Add": kernels.ADD, "Sub": kernels.SUBTRACT, "Mul": kernels.MULTIPLY, "Div": kernels.DIVIDE,
    "Max": kernels.LARGER, "Min": kernels.SMALLER, "ScaleAndAdd": kernels.SCALE_AND_ADD,
}  # fmt: skip


def _two(graph: Graph, node: Node) -> Operation | None:
    if len(node.inputs) != 2:
        return None
    fixed = [name in graph.constants for name in node.inputs]
    if any(fixed):
        return None if all(fixed) else _with_constant(graph, node, fixed.index(True))
    if node.op == "Add" and (found := sums.added(graph, node)) is not None:
        return found
    return _combined(graph, node)


def _with_constant(graph: Graph, node: Node, at: int) -> Operation | None:
    x = node.inputs[1 - at]
    of = image_of(graph, x)
    if of is None or graph.shape(x) != graph.shape(node.outputs[0]):
        return None
    c = per_channel(graph, node.inputs[at], x)
    if c is None and node.op == "Add" and (rows := _with_rows(graph, node, x, node.inputs[at])):
        return rows
    if c is None:
        return _combined(graph, node)
    one = np.ones(of.padded, np.float32)
    with np.errstate(divide="ignore"):
        affine = {
            "Add": (one, c), "Mul": (c, 0 * one), "Sub": (one, -c) if at else (-one, c),
            "Div": (1 / np.float64(c), 0 * one) if at else None,
        }.get(node.op)  # fmt: skip
    if affine is None:
        return _combined(graph, node)
    if not all(np.isfinite(a).all() for a in affine):
        return None
    scale, shift = (np.asarray(a, np.float32) for a in affine)
    return mapped(graph, node, x, affine=(scale, shift))


def _with_rows(graph: Graph, node: Node, x: str, name: str) -> Operation | None:
    """The sum with constant rows [tokens, channels], the same for each of a batch or its own."""
    of, shape, held = image_of(graph, x), graph.shape(x) or (), graph.constants.type(name)
    rows = held.shape or ()
    while len(rows) > 2 and rows[0] == 1:
        rows = rows[1:]
    if of is None or held.elem_type != 1 or len(shape) != 3 or rows not in (shape[1:], shape):
        return None
    if x in graph.channels_first:
        return None

    def more() -> np.ndarray:
        array = graph.constants.array(name).reshape(-1, of.channels)
        return np.pad(array, ((0, 0), (0, of.padded - of.channels)))

    n_bytes = 4 * math.prod(rows[:-1]) * of.padded

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], at.own["more"], at[one.makes], of.n_bytes // 64, n_bytes // 64]

    key = graph.constants.identity(name)
    weight = Weight(n_bytes, more, None if key is None else ("rows", key, rows))
    return Operation("rows_f32_add", [x], node.outputs[0], slots, [node], {"more": weight})


def per_channel(graph: Graph, name: str, x: str) -> np.ndarray | None:
    """A float32 constant for each channel of x, padded; None: it is something else.

    The pad is what makes neither a zero nor an infinity of anything.
    """
    of, shape = image_of(graph, x), graph.shape(x)
    held = graph.constants.type(name)
    if of is None or shape is None or held.elem_type != 1 or held.shape is None:
        return None
    axis = channel_axis(graph, x)
    whole = (1,) * (len(shape) - len(held.shape)) + held.shape
    if len(whole) > len(shape) or any(n != 1 for i, n in enumerate(whole) if i != axis):
        return None
    given = graph.constants.array(name).reshape(-1)
    found = np.full(of.padded, given[0] if given.size == 1 else 1, np.float32)
    found[: of.channels] = given
    return found


def _combined(graph: Graph, node: Node) -> Operation | None:
    a, b = node.inputs
    made = image_of(graph, node.outputs[0])
    held = {n: w for n in (a, b) if (w := _as_image(graph, n, node.outputs[0])) is not None}
    first, second = (held[n][0] if n in held else image_of(graph, n) for n in (a, b))
    read = [name for name in (a, b) if name not in graph.constants]
    ranks = {len(graph.shape(name) or ()) for name in (*read, node.outputs[0])}
    if first is None or second is None or made is None or len(ranks) != 1:
        return None
    if len(read) + len(held) != 2:  # a constant that lies in no way that is known here
        return None
    if ranks == {3} and len(read) == 2 and graph.shape(a) != graph.shape(b):
        return None
    if not all(_spreads(one, made) for one in (first, second)):
        return None

    def part(geometry: Geometry) -> Slots:
        pixels = geometry.pixels // made.images

        def steps(one: Operation, name: str, of: Image) -> list[int]:
            step = one.step(name, of)
            each = of.pixels == made.pixels
            between = step * (pixels if each else 1)
            return [between if of.images == made.images else 0, step if each else 0]

        def slots(one: Operation, at: Addresses) -> list[Any]:
            values = iter(one.reads)
            x, y = ("" if name in held else next(values) for name in (a, b))
            ends = (at[name] if name else at.own["constant"] for name in (x, y))
            return [
                *ends, at[one.makes], made.images, pixels, made.padded // 16,
                *steps(one, x, first), *steps(one, y, second), one.step(one.makes, made),
                _CODES[node.op], one.least, one.most,
            ]  # fmt: skip

        return slots

    whole = pixelwise(made)
    weights: dict[str, np.ndarray | Weight] = {}
    for _, weight in held.values():
        weights["constant"] = weight
    return Operation(
        "images_combine", read, node.outputs[0], part(whole), [node], weights,
        windows=Windows(whole, part) if first == second and not held else None,
    )  # fmt: skip


def _as_image(graph: Graph, name: str, made: str) -> tuple[Image, Weight] | None:
    """How a float32 constant lies that is spread over an image; None: it is none, or wider."""
    of, shape = image_of(graph, made), graph.shape(made) or ()
    if name not in graph.constants or of is None or channel_axis(graph, made) != 1:
        return None
    held = graph.constants.type(name)
    given = held.shape or ()
    whole = (1,) * (len(shape) - len(given)) + given
    if held.elem_type != 1 or len(whole) != len(shape):
        return None
    if any(n not in (1, wide) for n, wide in zip(whole, shape, strict=True)):
        return None
    alone = set(whole[2:]) == {1}  # one pixel for all
    sizes = (1, 1) if alone else (of.height, of.width)
    image = Image(whole[0], *sizes, of.channels)

    def make() -> np.ndarray:
        array = graph.constants.array(name).reshape(whole)
        array = np.broadcast_to(array, (whole[0], shape[1], *(whole if alone else shape)[2:]))
        array = array.reshape(image.images, image.channels, image.pixels).transpose(0, 2, 1)
        # The pad is what makes neither a zero nor an infinity of anything.
        pad = ((0, 0), (0, 0), (0, image.padded - image.channels))
        return np.pad(array, pad, constant_values=1).astype(np.float32)

    key = graph.constants.identity(name)
    return image, Weight(image.n_bytes, make, None if key is None else ("image", key, shape))


def _spreads(one: Image, made: Image) -> bool:
    """Whether a value is there for each pixel or image of what is made, or once for all."""
    same = (one.height, one.width) == (made.height, made.width) or one.pixels == 1
    return same and one.images in (1, made.images) and one.channels == made.channels


def _batch_norm(graph: Graph, node: Node) -> Operation | None:
    x, *names = node.inputs
    if len(graph.shape(x) or ()) not in (2, 4) or node.attribute("training_mode", 0):
        return None
    if not node.attribute("spatial", 1):  # before operator set 9: factors of each pixel
        return None
    if any(name not in graph.constants for name in names) or any(node.outputs[1:]):
        return None
    of = image_of(graph, x)
    if of is None or any(graph.constants.type(n).shape != (of.channels,) for n in names):
        return None
    factor, summand, mean, variance = (np.float64(graph.constants.array(n)) for n in names)
    factor = factor / np.sqrt(variance + node.attribute("epsilon", 1e-5))
    scale, shift = np.ones(of.padded, np.float32), np.zeros(of.padded, np.float32)
    scale[: of.channels], shift[: of.channels] = factor, summand - mean * factor
    return mapped(graph, node, x, affine=(scale, shift))


OPERATORS = {
    **dict.fromkeys((*_CODES, "headrace.ScaleAndAdd"), _two), "BatchNormalization": _batch_norm,
}  # fmt: skip
del OPERATORS["ScaleAndAdd"]
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Add, Sub, Mul, Div, Max, Min": (
        "two values, of which one may have one pixel for all; a constant, of all, of each "
        "channel or of each pixel; Add also constant rows"
    ),
    "BatchNormalization": "of images, and of rows of two dimensions",
}
