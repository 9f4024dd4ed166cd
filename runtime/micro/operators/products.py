"""ONNX's convolutions, fully connected layers and pools as layers of microcontrollers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.micro.held import NO_PADS, Pads, pads_of
from headrace.micro.network import (
    Convolution,
    Depthwise,
    Pool,
    Value,
    Windows,
)
from headrace.networks.graph import Node
from headrace.networks.quantisation import int8_weights, named

if TYPE_CHECKING:
    from headrace.micro.reading import Reading

MOST_INT32 = 2**31 - 1
_MOST_STEP = 1 << 16  # of windows, and of pads: as of TFLite files


def _windows(
    of: Reading, node: Node, read: Value, made: tuple[int, ...], taps: tuple[int, ...],
    more: Pads = NO_PADS, *, padded: bool = False,
) -> Windows:  # fmt: skip
    """Windows of an image; a row is an image of one row.

    Args:
        more: zeros around it besides the node's.
        padded: the node's are there already.
    """
    rank = len(taps)
    strides, dilations, pads = (
        list(node.attribute(name, [default] * rank))
        for name, default in (("strides", 1), ("dilations", 1), ("pads", 0))
    )
    if not len(strides) == len(dilations) == rank or rank not in (1, 2) or len(pads) < rank:
        raise of.unsupported(node, "windows of one or two dimensions are done")
    pads = [0] * rank if padded else pads[:rank]
    if rank == 1:
        taps, strides, dilations, pads = (1, *taps), [1, *strides], [1, *dilations], [0, *pads]
    if node.attribute("ceil_mode", 0):
        raise of.unsupported(node, "ceil_mode is not done")
    auto = (node.attribute("auto_pad", b"NOTSET") or b"").decode()
    for i in (0, 1):
        if auto.startswith("SAME"):
            reach = (taps[i] - 1) * dilations[i] + 1
            size = read.image[i] + more[0][i] + more[1][i]
            wanted = (made[i] - 1) * strides[i] + reach - size
            if wanted < -1:  # of which onnxruntime has several views
                raise of.unsupported(node, "auto_pad of windows that leave pixels out between them")
            total = max(wanted, 0)
            pads[i] = total // 2 if auto == "SAME_UPPER" else total - total // 2
        elif auto == "VALID":
            pads[i] = 0
        pads[i] += more[0][i]
    numbers = (*strides, *dilations, *taps)
    if min(numbers) < 1 or min(pads) < 0 or max(*numbers, *pads) > _MOST_STEP:
        raise of.unsupported(node, f"strides {strides}, dilations {dilations}, pads {pads}")
    return Windows(*((a, b) for a, b in (taps, strides, pads, dilations)))


def _ends(windows: Windows, read: Value, made: tuple[int, ...]) -> tuple[Pads, bool]:
    """Pads around an image, and whether there is a window of them alone."""
    behind, alone = [0, 0], False
    for i, size in enumerate(read.image[:2]):
        reach = (windows.taps[i] - 1) * windows.dilations[i] + 1
        last = (made[i] - 1) * windows.strides[i] - windows.pads[i]
        behind[i] = max(0, last + reach - size)
        alone = alone or windows.pads[i] >= reach or last >= size
    return (windows.pads, (behind[0], behind[1])), alone


def _weights(of: Reading, node: Node, index: int, axis: int) -> tuple[np.ndarray, Any]:
    """Weights, and scales for each entry of an axis where they are codes."""
    source = of.matcher.maker(node.inputs[index], "DequantizeLinear")
    if source is None or of.given(node.inputs[0]).value.codes is None:
        return of.array(node, index).astype(np.float32), None
    found = int8_weights(
        of.graph, source.inputs[0], source.inputs[1], named(source.inputs, 2), axis
    )
    if found is None or source.attribute("block_size", 0):
        raise of.unsupported(
            node,
            "its weights are no codes of 8 bits around 0, with a scale for each channel that is "
            "made: quantise them so (weight_type=QuantType.QInt8 of onnxruntime)",
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
    source, constants = of.matcher.maker(node.inputs[index], "DequantizeLinear"), of.graph.constants
    if source is not None and all(name in constants for name in source.inputs[:2]):
        codes, given = (constants.array(name) for name in source.inputs[:2])
        near = np.allclose(given.reshape(-1), unit, rtol=1e-5, atol=0)
        if codes.dtype == np.int32 and given.size in (1, made) and near:
            return _fitting(of, node, codes, made)
    return in_products(of, node, _fitting(of, node, of.array(node, index), made), read, scales)


def in_products(
    of: Reading, node: Node, bias: np.ndarray, read: Value, scales: np.ndarray
) -> np.ndarray:
    """A bias in units of products, int32."""
    assert read.codes is not None
    unit = np.float64(np.float32(read.codes.scale)) * scales.astype(np.float64)
    whole: np.ndarray = np.rint(bias / unit)
    if not (np.abs(whole) <= MOST_INT32).all():
        raise of.unsupported(node, "its bias is too large for the scales of what it multiplies")
    return whole.astype(np.int32)


def _fitting(of: Reading, node: Node, bias: np.ndarray, made: int) -> np.ndarray:
    if bias.size not in (1, made):
        raise of.unsupported(node, f"its bias has the shape {list(bias.shape)}, and not [{made}]")
    return np.broadcast_to(bias.reshape(-1), made)


def conv(of: Reading, node: Node) -> None:
    """Conv, of one group or of one for each channel."""
    made = of.made_shape(node)
    weights, scales = _weights(of, node, 1, 0)
    groups = node.attribute("group", 1)
    if weights.ndim not in (3, 4) or made[-1] != weights.shape[0]:
        raise of.unsupported(node, "convolutions of one or two dimensions are done")
    taps = weights.shape[2:]
    if len(taps) == 1:
        weights = weights[:, :, None]
    read, more = of.unpadded(node, (weights.shape[2] - 1, weights.shape[3] - 1))
    bias = _bias(of, node, 2, read, made[-1], scales)
    windows = _windows(of, node, read, made, taps, more)
    ends, alone = _ends(windows, read, made)
    if alone:  # kernels have windows that see a pixel
        read = of.surrounded(read, f"{node.outputs[0]}/padded", ends)
        windows = replace(windows, pads=(0, 0))
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


def gemm(of: Reading, node: Node) -> None:
    """Gemm and MatMul, of a row and a constant."""
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


def pool(of: Reading, node: Node) -> None:
    """Pools of windows, or of all pixels."""
    read, made, counted = of.image(node), of.made_shape(node), False
    if node.op == "ReduceMean":
        shape = of.graph.shape(node.inputs[0]) or ()
        named_ones = of.array(node, 1).reshape(-1).tolist() if named(node.inputs, 1) else []
        axes = list(node.attribute("axes") or named_ones)
        if not axes and not node.attribute("noop_with_empty_axes", 0):
            axes = list(range(len(shape)))
        # Of a dimension of one the mean is what is there.
        many = {axis % len(shape) for axis in axes} - {i for i, n in enumerate(shape) if n == 1}
        if many != {i for i in range(2, len(shape)) if shape[i] != 1}:
            raise of.unsupported(node, f"a mean of axes {axes}; one of all pixels is done")
    if node.op in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean"):
        windows = Windows(read.image[:2], read.image[:2])
        made = (1, 1, read.shape[2]) if len(made) == 3 else made
    else:
        taps, pads = tuple(node.attribute("kernel_shape")), node.attribute("pads") or []
        counted = bool(node.attribute("count_include_pad", 0)) and any(pads)
        if counted:  # these zeros are pixels like others
            ends = pads_of(pads[: len(taps)], pads[len(taps) :])
            read = of.surrounded(read, f"{node.outputs[0]}/padded", ends)
        windows = _windows(of, node, read, made, taps, padded=counted)
        if windows.dilations != (1, 1):
            raise of.unsupported(node, "a pool of pixels with gaps between")
        ends, alone = _ends(windows, read, made)
        if node.attribute("count_include_pad", 0) and ends != NO_PADS:
            raise of.unsupported(
                node, "a mean that counts pads of auto_pad; explicit ones are done"
            )
        if alone:
            raise of.unsupported(node, "it has windows of pads alone; give it fewer pads")
    if node.op in ("MaxPool", "GlobalMaxPool"):  # the most of codes is one of them
        makes = Value(node.outputs[0], made, read.codes)
        of.add(node, Pool(node.label, (read,), makes, "most", windows), real=True)
    else:
        makes = Value(node.outputs[0], made, None)
        of_numbers = node.op == "ReduceMean"  # as TFLite's MEAN
        of.add(node, Pool(node.label, (read,), makes, "mean", windows, of_numbers=of_numbers))
