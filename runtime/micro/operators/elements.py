"""ONNX's functions of each element and of each channel as layers of microcontrollers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.micro.network import (
    UNBOUNDED,
    Activation,
    Add,
    Convolution,
    Depthwise,
    Multiply,
    Softmax,
    Value,
    Windows,
)
from headrace.micro.operators.products import MOST_INT32, in_products
from headrace.networks.graph import Node
from headrace.networks.operators.bounds import bounds_of

if TYPE_CHECKING:
    from headrace.micro.reading import Reading

_SIXTH = 1e-6  # relatively, as files round it


def _two(of: Reading, node: Node) -> tuple[tuple[Value, Value], tuple[int, ...]]:
    """What a node of two values reads, and the shape that it makes."""
    made = of.made_shape(node)
    flat = any(of.number(node, i).flat for i in (0, 1))
    if flat:
        raise of.unsupported(node, "it reads an image as a row, channels first; that is not done")
    first, second = (
        of.image(node, i) if len(made) == 3 else of.number(node, i).value for i in (0, 1)
    )
    return (first, second), made


def add(of: Reading, node: Node) -> None:
    """The sum of two values, or of one and a constant."""
    if _constant(of, node) is not None:
        affine(of, node)
        return
    reads, made = _two(of, node)
    if any(value.shape != made for value in reads):
        raise of.unsupported(node, "a sum of two values of one shape is done")
    of.add(node, Add(node.label, reads, Value(node.outputs[0], made, None)))


def multiply(of: Reading, node: Node) -> None:
    """The same as a product."""
    if _constant(of, node) is not None:
        affine(of, node)
        return
    reads, made = _two(of, node)
    if reads[0].shape != made:
        reads = reads[::-1]
    # Of shapes that are not as long the shorter one has channels where the other has rows.
    ranks = {len(of.graph.shape(name) or ()) for name in node.inputs}
    shapes = (made, (1, 1, made[-1])) if len(ranks) == 1 else (made,)
    if reads[0].shape != made or reads[1].shape not in shapes:
        raise of.unsupported(
            node, "a product of two values of one shape, or with a factor for each channel, is done"
        )
    of.add(node, Multiply(node.label, reads, Value(node.outputs[0], made, None)))


def _constant(of: Reading, node: Node) -> int | None:
    """Which of two inputs is a constant."""
    return next((i for i in (1, 0) if of.is_constant(node, i)), None)


def affine(of: Reading, node: Node) -> None:
    """A sum or product with a constant."""
    index = _constant(of, node)
    if index is None or (index == 0 and node.op in ("Sub", "Div")):
        raise of.unsupported(node, "a value, then a constant, is done")
    made, constant = of.made_shape(node), of.array(node, index).astype(np.float64)
    rank = len(of.graph.shape(node.outputs[0]) or ())
    by_axis = (1,) * (rank - constant.ndim) + constant.shape
    channels = by_axis[1] if len(by_axis) > 1 else 0
    if len(by_axis) != rank or constant.size not in (1, channels) or channels not in (1, made[-1]):
        raise of.unsupported(
            node, f"a constant {list(constant.shape)}; one number, or one for each channel, is done"
        )
    each = np.broadcast_to(constant.reshape(-1), made[-1])
    ones, zeros = np.ones(made[-1]), np.zeros(made[-1])
    factor, bias = {
        "Add": (ones, each), "Sub": (ones, -each), "Mul": (each, zeros),
        "Div": (1 / np.where(each == 0, np.nan, each), zeros),
    }[node.op]  # fmt: skip
    if not np.isfinite(factor).all():
        raise of.unsupported(node, "it divides by 0")
    _each_channel(of, node, factor, bias, 1 - index)


def batch_norm(of: Reading, node: Node) -> None:
    """A factor and a bias for each channel, of statistics that the file has."""
    if node.attribute("training_mode", 0):
        raise of.unsupported(node, "its statistics are those of its input; export it for inference")
    scale, bias, mean, variance = (of.array(node, i).astype(np.float64) for i in range(1, 5))
    square = variance + node.attribute("epsilon", 1e-5)
    if not (square > 0).all():
        raise of.unsupported(node, f"a variance of {variance.min():g}; it has to be above 0")
    factor = scale / np.sqrt(square)
    _each_channel(of, node, factor, bias - mean * factor)


def _each_channel(
    of: Reading, node: Node, factor: np.ndarray, bias: np.ndarray, index: int = 0
) -> None:
    """A factor and a bias for each channel: into the convolution in front, or as one of pixels."""
    made = of.made_shape(node)
    read = of.image(node, index) if len(made) == 3 else of.number(node, index).value
    if factor.shape != made[-1:] or read.shape != made or of.number(node, index).flat:
        raise of.unsupported(
            node, f"numbers {list(factor.shape)} for each channel of {list(read.shape)}"
        )
    before = of.made_alone(node.inputs[index])
    if isinstance(before, (Convolution, Depthwise)) and before.bounds == UNBOUNDED:
        if before.scales is None:
            by_made = factor.reshape(-1, 1, 1, 1) if isinstance(before, Convolution) else factor
            of.change(
                node, before, index=index, weights=(before.weights * by_made).astype(np.float32),
                bias=(before.bias * factor + bias).astype(np.float32),
            )  # fmt: skip
            return
        if (factor == 1).all():
            more = in_products(of, node, bias, before.reads[0], before.scales)
            of.change(node, before, index=index, bias=_summed(of, node, before.bias, more))
            return
    weights, makes = factor.reshape(1, 1, -1).astype(np.float32), Value(node.outputs[0], made, None)
    added = bias.astype(np.float32)
    of.add(node, Depthwise(node.label, (read,), makes, weights, added, None, Windows()))


def _summed(of: Reading, node: Node, bias: np.ndarray, more: np.ndarray) -> np.ndarray:
    total: np.ndarray = bias.astype(np.int64) + more
    if (np.abs(total) > MOST_INT32).any():
        raise of.unsupported(node, "its bias is too large for the scales of what it multiplies")
    return total.astype(np.int32)


def bounded(of: Reading, node: Node) -> None:
    """Relu and Clip: into the layer in front, if that has bounds."""
    bounds = bounds_of(of.graph, node)
    if bounds is None:
        raise of.unsupported(node, "its bounds are no constants")
    before = of.made_alone(node.inputs[0])
    if before is not None and hasattr(before, "bounds"):
        ends = (min(max(end, bounds[0]), bounds[1]) for end in before.bounds)
        of.change(node, before, bounds=tuple(ends))
    else:
        function(of, node, "identity", bounds=bounds)


def function(of: Reading, node: Node, kind: str, **more: Any) -> None:
    """A function of each element."""
    held = of.number(node)  # each element for itself: all stay where they are
    makes = Value(node.outputs[0], held.value.shape, None)
    layer = Activation(node.label, (held.value,), makes, kind, **more)  # type: ignore[arg-type]
    of.add(node, layer, first=held.first, flat=held.flat)


def leaky(of: Reading, node: Node) -> None:
    """LeakyRelu."""
    function(of, node, "leaky_relu", slope=float(node.attribute("alpha", 0.01)))


def hard(of: Reading, node: Node, kind: str) -> None:
    """HardSigmoid and HardSwish, whose numbers are fixed in ONNX."""
    own = node.op == "HardSwish" and not node.domain
    alpha = node.attribute("alpha", 1 / 6 if own else 0.2)
    beta = node.attribute("beta", 0.5)
    if not math.isclose(alpha, 1 / 6, rel_tol=_SIXTH) or beta != 0.5:
        raise of.unsupported(node, f"alpha {alpha} and beta {beta}; a sixth and a half are done")
    function(of, node, kind)


def softmax(of: Reading, node: Node) -> None:
    """Of a row, or of each pixel's channels."""
    held, shape = of.number(node), of.graph.shape(node.inputs[0]) or ()
    newer = of.graph.opsets.get("", 0) >= 13
    axis = node.attribute("axis", -1 if newer else 1) % len(shape)
    in_order = axis == len(shape) - 1 and not held.first
    # Before operator set 13 all dimensions from the axis on are one.
    whole = newer or math.prod(shape[axis + 1 :]) == 1
    if held.flat or not whole or not (in_order or axis == 1):
        raise of.unsupported(node, "a softmax of a row, or of a pixel's channels, is done")
    read = held.value if in_order else of.image(node)
    makes = Value(node.outputs[0], read.shape, None)
    of.add(node, Softmax(node.label, (read,), makes), first=not in_order)
