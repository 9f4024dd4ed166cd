"""Activations of single values: the last step of a convolution, or one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.kernels.finishes import (
    HARD_SIGMOID,
    HARD_SWISH,
    LEAKY,
    MAGNITUDE,
    ROOT,
    SIGMOID,
    SILU,
    SQUARE,
    TANH,
    Finish,
)
from headrace.kernels.geometry import Geometry
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    NOTHING,
    Addresses,
    Operation,
    Slots,
    Windows,
    image_of,
    pixelwise,
)


def mapped(
    graph: Graph, node: Node, x: str, finish: Finish = NOTHING,
    affine: tuple[np.ndarray, np.ndarray] | None = None,
) -> Operation | None:  # fmt: skip
    """One pass over x; `affine` is of padded channels. None: x is no value of ours."""
    of = image_of(graph, x)
    if of is None or x in graph.constants:
        return None

    def part(geometry: Geometry) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            steps = one.step(one.reads[0], of), one.step(one.makes, of)
            return [
                at[one.reads[0]], at[one.makes], at.own.get("scales", 0), at.own.get("shifts", 0),
                geometry.pixels, of.padded // 16, *steps, one.least, one.most, *one.finish.slots(),
            ]  # fmt: skip

        return slots

    windows = Windows(pixelwise(of), part)
    return Operation(
        "images_map", [x], node.outputs[0], part(windows.geometry), [node], affine=affine,
        finish=finish, windows=windows,
    )  # fmt: skip


def _by(kind: int) -> Callable[[Graph, Node], Operation | None]:
    return lambda graph, node: mapped(graph, node, node.inputs[0], Finish(kind))


def _power(graph: Graph, node: Node) -> Operation | None:
    x, name = node.inputs
    if name not in graph.constants or math.prod(graph.constants.type(name).shape or ()) != 1:
        return None
    if graph.shape(x) != graph.shape(node.outputs[0]):
        return None
    kind = {2.0: SQUARE, 0.5: ROOT}.get(float(graph.constants.array(name).reshape(-1)[0]))
    return None if kind is None else mapped(graph, node, x, Finish(kind))


def _hard_sigmoid(graph: Graph, node: Node) -> Operation | None:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    return mapped(graph, node, node.inputs[0], Finish(HARD_SIGMOID, alpha, beta))


def _hard_swish(graph: Graph, node: Node) -> Operation | None:
    alpha, beta = node.attribute("alpha", 1 / 6), node.attribute("beta", 0.5)
    return mapped(graph, node, node.inputs[0], Finish(HARD_SWISH, alpha, beta))


def _leaky(graph: Graph, node: Node) -> Operation | None:
    return mapped(graph, node, node.inputs[0], Finish(LEAKY, node.attribute("alpha", 0.01)))


OPERATORS = {
    "Sigmoid": _by(SIGMOID), "HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish,
    "LeakyRelu": _leaky, "Sqrt": _by(ROOT), "Tanh": _by(TANH), "Abs": _by(MAGNITUDE), "Pow": _power,
    "headrace.Silu": _by(SILU), "headrace.HardSwish": _hard_swish,
}  # fmt: skip
# For the table in docs/onnx.md: which of them.
WHICH = {
    "Sigmoid, HardSigmoid, HardSwish, LeakyRelu, Tanh, Sqrt, Abs, Pow": (
        "and SiLU and HardSwish as exporters spell them; powers 2 and 1/2"
    ),
}
