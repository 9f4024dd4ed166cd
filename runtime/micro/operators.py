"""ONNX's operators as layers of microcontrollers: a function for each kind, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from headrace.micro.network import (
    UNBOUNDED,
    Activation,
    Add,
    Conversion,
    Convolution,
    Depthwise,
    Layer,
    Pool,
    Softmax,
    Value,
    Windows,
)
from headrace.networks.graph import Node
from headrace.networks.operators.bounds import bounds_of
from headrace.networks.quantisation import int8_weights, named

if TYPE_CHECKING:
    from headrace.micro.reading import Reading

_MOST_INT32 = 2**31 - 1
_SIXTH = 1e-6  # relatively, as files round it


def _windows(
    of: Reading, node: Node, read: Value, made: tuple[int, ...], taps: tuple[int, ...]
) -> Windows:
    strides = tuple(node.attribute("strides", [1, 1]))
    dilations = tuple(node.attribute("dilations", [1, 1]))
    if not len(taps) == len(strides) == len(dilations) == 2:
        raise of.unsupported(node, "windows of two dimensions are done")
    if node.attribute("ceil_mode", 0):
        raise of.unsupported(node, "ceil_mode is not done")
    auto = (node.attribute("auto_pad", b"NOTSET") or b"").decode()
    pads = list(node.attribute("pads", [0, 0, 0, 0])[:2])
    for i in (0, 1):
        if auto.startswith("SAME"):
            reach = (taps[i] - 1) * dilations[i] + 1
            total = max((made[i] - 1) * strides[i] + reach - read.image[i], 0)
            pads[i] = total // 2 if auto == "SAME_UPPER" else total - total // 2
        elif auto == "VALID":
            pads[i] = 0
    if min(*strides, *dilations, *taps) < 1 or min(pads) < 0:
        raise of.unsupported(node, f"strides {strides}, dilations {dilations}, pads {pads}")
    return Windows(*((a, b) for a, b in (taps, strides, pads, dilations)))


def _weights(of: Reading, node: Node, index: int, axis: int) -> tuple[np.ndarray, Any]:
    """Weights, and scales for each entry of an axis where they are codes."""
    source = of.matcher.maker(node.inputs[index], "DequantizeLinear")
    if source is None or of.held(node.inputs[0]).value.codes is None:
        return of.array(node, index).astype(np.float32), None
    found = int8_weights(
        of.graph, source.inputs[0], source.inputs[1], named(source.inputs, 2), axis
    )
    if found is None or source.attribute("block_size", 0):
        raise of.unsupported(
            node, "its weights are no codes of 8 bits with a scale for each channel that is made"
        )
    if found[1].size > 1 and len(of.matcher.shape(source.inputs[1]) or ()) > 0:
        rank = found[0].ndim
        several = math.prod(of.matcher.shape(source.inputs[1]) or ()) > 1
        if several and source.attribute("axis", 1) % rank != axis:
            raise of.unsupported(node, "scales of weights are not those of channels that are made")
    return found


def _bias(of: Reading, node: Node, index: int, read: Value, made: int, scales: Any) -> np.ndarray:
    """A bias as numbers, or in units of products."""
    if not named(node.inputs, index):
        return np.zeros(made, np.float32 if scales is None else np.int32)
    if scales is None:
        return _fitting(of, node, of.array(node, index), made).astype(np.float32)
    assert read.codes is not None
    unit = np.float64(np.float32(read.codes.scale)) * scales.astype(np.float64)
    source = of.matcher.maker(node.inputs[index], "DequantizeLinear")
    if source is not None:
        codes, given = (of.graph.constants.array(name) for name in source.inputs[:2])
        near = np.allclose(given.reshape(-1), unit, rtol=1e-5, atol=0)
        if codes.dtype == np.int32 and given.size in (1, made) and near:
            return _fitting(of, node, codes, made)
    whole: np.ndarray = np.rint(_fitting(of, node, of.array(node, index), made) / unit)
    if not (np.abs(whole) <= _MOST_INT32).all():
        raise of.unsupported(node, "its bias is too large for the scales of what it multiplies")
    return whole.astype(np.int32)


def _fitting(of: Reading, node: Node, bias: np.ndarray, made: int) -> np.ndarray:
    if bias.size not in (1, made):
        raise of.unsupported(node, f"its bias has the shape {list(bias.shape)}, and not [{made}]")
    return np.broadcast_to(bias.reshape(-1), made)


def _conv(of: Reading, node: Node) -> None:
    read, made = of.image(node), of.made_shape(node)
    weights, scales = _weights(of, node, 1, 0)
    groups = node.attribute("group", 1)
    if weights.ndim != 4 or made[-1] != weights.shape[0]:
        raise of.unsupported(node, "convolutions of two dimensions are done")
    bias = _bias(of, node, 2, read, made[-1], scales)
    windows = _windows(of, node, read, made, weights.shape[2:])
    makes = Value(node.outputs[0], made, None)
    first = (node.label, (read,), makes)
    if groups == 1 and weights.shape[1] == read.shape[2]:
        turned = np.ascontiguousarray(weights.transpose(0, 2, 3, 1))
        of.add(node, Convolution(*first, turned, bias, scales, windows))
    elif groups == read.shape[2] and weights.shape[1] == 1:
        turned = np.ascontiguousarray(weights[:, 0].transpose(1, 2, 0))
        of.add(node, Depthwise(*first, turned, bias, scales, windows))
    else:
        raise of.unsupported(node, f"{groups} groups; one, or one for each channel, are done")


def _gemm(of: Reading, node: Node) -> None:
    turned = node.op == "Gemm" and bool(node.attribute("transB", 0))
    factors = (node.attribute("alpha", 1.0), node.attribute("beta", 1.0))
    if factors != (1.0, 1.0) or node.attribute("transA", 0):
        raise of.unsupported(node, "alpha, beta or transA; a plain product is done")
    held, made = of.number(node), of.made_shape(node)
    weights, scales = _weights(of, node, 1, 0 if turned else 1)
    weights = weights if turned else weights.T
    read = held.value
    if weights.ndim != 2 or len(made) != 1 or weights.shape != (made[0], read.elements):
        raise of.unsupported(node, f"weights {list(weights.shape)} of {list(read.shape)}")
    rows, columns, channels = read.image
    if held.flat:  # the graph has channels first
        weights = weights.reshape(-1, channels, rows, columns).transpose(0, 2, 3, 1)
    elif len(read.shape) == 3:
        read, (rows, columns, channels) = (
            of.view(node.inputs[0], held, (read.elements,), first=False), (1, 1, read.elements),
        )  # fmt: skip
    weights = np.ascontiguousarray(weights.reshape(-1, rows, columns, channels))
    bias = _bias(of, node, 2, read, made[0], scales)
    makes = Value(node.outputs[0], made, None)
    windows = Windows((rows, columns))
    of.add(node, Convolution(node.label, (read,), makes, weights, bias, scales, windows))


def _pool(of: Reading, node: Node) -> None:
    read, made = of.image(node), of.made_shape(node)
    if node.op == "ReduceMean":
        axes = node.attribute("axes") or of.array(node, 1).reshape(-1).tolist()
        if sorted(axis % 4 for axis in axes) != [2, 3]:
            raise of.unsupported(node, f"a mean of axes {list(axes)}; one of all pixels is done")
    if node.op in ("GlobalAveragePool", "ReduceMean"):
        windows = Windows(read.image[:2], read.image[:2])
        made = (1, 1, read.shape[2]) if len(made) == 3 else made
    else:
        windows = _windows(of, node, read, made, tuple(node.attribute("kernel_shape")))
        if windows.dilations != (1, 1):
            raise of.unsupported(node, "a pool of pixels with gaps between")
        padded = any(node.attribute("pads", [0])) or windows.pads != (0, 0)
        if padded and node.attribute("count_include_pad", 0):
            raise of.unsupported(node, "a mean that counts pads; one of pixels is done")
    if node.op == "MaxPool":  # the most of codes is one of them
        makes = Value(node.outputs[0], made, read.codes)
        of.add(node, Pool(node.label, (read,), makes, "most", windows), real=True)
    else:
        makes = Value(node.outputs[0], made, None)
        of.add(node, Pool(node.label, (read,), makes, "mean", windows))


def _add(of: Reading, node: Node) -> None:
    made = of.made_shape(node)
    reads = [of.image(node, i) if len(made) == 3 else of.number(node, i).value for i in (0, 1)]
    flat = any(of.number(node, i).flat for i in (0, 1))
    if flat or any(value.shape != made for value in reads):
        raise of.unsupported(node, "a sum of two values of one shape is done")
    of.add(node, Add(node.label, tuple(reads), Value(node.outputs[0], made, None)))


def _bounded(of: Reading, node: Node) -> None:
    bounds = bounds_of(of.graph, node)
    if bounds is None:
        raise of.unsupported(node, "its bounds are no constants")
    before = of.made_alone(node.inputs[0])
    if before is not None and hasattr(before, "bounds"):
        ends = (min(max(end, bounds[0]), bounds[1]) for end in before.bounds)
        of.change(node, before, bounds=tuple(ends))
    else:
        _function(of, node, "identity", bounds=bounds)


def _function(of: Reading, node: Node, kind: str, **more: Any) -> None:
    held = of.number(node)
    if held.flat:  # each element for itself: it stays an image
        read = held.value
    else:
        read = of.image(node) if len(of.made_shape(node)) == 3 else held.value
    makes = Value(node.outputs[0], read.shape, None)
    layer = Activation(node.label, (read,), makes, kind, **more)  # type: ignore[arg-type]
    of.add(node, layer, flat=held.flat)


def _leaky(of: Reading, node: Node) -> None:
    _function(of, node, "leaky_relu", slope=float(node.attribute("alpha", 0.01)))


def _hard(of: Reading, node: Node, kind: str) -> None:
    """HardSigmoid and HardSwish, whose numbers are fixed in ONNX."""
    own = node.op == "HardSwish" and not node.domain
    alpha = node.attribute("alpha", 1 / 6 if own else 0.2)
    beta = node.attribute("beta", 0.5)
    if not math.isclose(alpha, 1 / 6, rel_tol=_SIXTH) or beta != 0.5:
        raise of.unsupported(node, f"alpha {alpha} and beta {beta}; a sixth and a half are done")
    _function(of, node, kind)


def _softmax(of: Reading, node: Node) -> None:
    held, made = of.number(node), of.made_shape(node)
    rank = len(of.graph.shape(node.inputs[0]) or ())
    if rank != 2 or held.flat or node.attribute("axis", -1) % rank != 1:
        raise of.unsupported(node, "a softmax of a row is done")
    of.add(node, Softmax(node.label, (held.value,), Value(node.outputs[0], made, None)))


def _batch_norm(of: Reading, node: Node) -> None:
    """Into the convolution in front of it, or as one of each channel's single pixels."""
    scale, bias, mean, variance = (of.array(node, i).astype(np.float64) for i in range(1, 5))
    factor = scale / np.sqrt(variance + node.attribute("epsilon", 1e-5))
    before = of.made_alone(node.inputs[0])
    if _takes_factors(before):
        by_made = factor.reshape(-1, 1, 1, 1) if isinstance(before, Convolution) else factor
        of.change(
            node, before, weights=(before.weights * by_made).astype(np.float32),
            bias=((before.bias - mean) * factor + bias).astype(np.float32),
        )  # fmt: skip
    else:
        _each_channel(of, node, factor, bias - mean * factor)


def _takes_factors(layer: Layer | None) -> TypeGuard[Convolution | Depthwise]:
    """Whether a layer's weights may be multiplied by those of what it makes."""
    convolves = isinstance(layer, (Convolution, Depthwise))
    return convolves and layer.scales is None and layer.bounds == UNBOUNDED


def _each_channel(of: Reading, node: Node, factor: np.ndarray, bias: np.ndarray) -> None:
    """What a node reads times a factor for each channel, and a bias."""
    made = of.made_shape(node)
    read = of.image(node) if len(made) == 3 else of.number(node).value
    if read.shape != made or factor.shape != made[-1:]:
        raise of.unsupported(node, f"numbers {list(factor.shape)} for each channel of {list(made)}")
    weights, makes = factor.reshape(1, 1, -1).astype(np.float32), Value(node.outputs[0], made, None)
    bias = bias.astype(np.float32)
    of.add(node, Depthwise(node.label, (read,), makes, weights, bias, None, Windows()))


def _quantize(of: Reading, node: Node) -> None:
    held, codes = of.held(node.inputs[0]), of.codes_of(node)
    if held.value.codes is None:
        before = of.made_alone(node.inputs[0])
        if before is not None:
            of.change(node, before, codes)
            return
        makes = Value(node.outputs[0], held.value.shape, codes)
        of.add(node, Conversion(node.label, (held.value,), makes))
        of.put(node.outputs[0], replace(held, value=makes))
        return
    if held.value.codes == codes:
        of.put(node.outputs[0], held.of_codes())
        return
    makes = Value(node.outputs[0], held.value.shape, codes)
    of.add(node, Activation(node.label, (held.value,), makes, "identity"))
    of.put(node.outputs[0], held.of_codes(makes))


def _dequantize(of: Reading, node: Node) -> None:
    if node.inputs[0] in of.graph.constants:
        return
    held, codes = of.held(node.inputs[0]), of.codes_of(node)
    if held.value.codes != codes:
        raise of.unsupported(node, "its codes mean something else where they were made")
    of.put(node.outputs[0], held.of_numbers())


def _reshape(of: Reading, node: Node) -> None:
    held = of.held(node.inputs[0])
    shape = of.graph.shape(node.outputs[0]) or ()
    if shape[:1] != (1,) or len(shape) not in (2, 4):
        raise of.unsupported(node, f"a result of shape {list(shape)}")
    if not held.in_order:
        if len(shape) != 2:
            raise of.unsupported(node, "it would take a transposition, which is not done")
        of.put(node.outputs[0], held.as_row())
        return
    # The name of what it makes first, so that a view that is made has it.
    of.put(node.outputs[0], held)
    of.view(node.outputs[0], held, shape[1:], first=False)


def _transpose(of: Reading, node: Node) -> None:
    if node.inputs[0] in of.graph.constants:
        return
    held, perm = of.held(node.inputs[0]), tuple(node.attribute("perm", ()))
    turns = {(0, 3, 1, 2): True, (0, 2, 3, 1): False}
    if perm not in turns or held.first == turns[perm]:
        raise of.unsupported(node, f"a transposition {list(perm)}")
    of.put(node.outputs[0], held.turned(turns[perm]))


def _identity(of: Reading, node: Node) -> None:
    if node.inputs[0] not in of.graph.constants:
        of.put(node.outputs[0], of.held(node.inputs[0]))


OPERATORS: dict[str, Callable[[Any, Node], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _gemm,
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMean"), _pool),
    "Add": _add,
    **dict.fromkeys(("Relu", "Clip"), _bounded),
    "HardSwish": partial(_hard, kind="hard_swish"),
    "HardSigmoid": partial(_hard, kind="hard_sigmoid"),
    "Sigmoid": partial(_function, kind="sigmoid"),
    "Tanh": partial(_function, kind="tanh"),
    "LeakyRelu": _leaky,
    "Softmax": _softmax,
    "BatchNormalization": _batch_norm,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    **dict.fromkeys(("Identity", "Dropout"), _identity),
}
