"""Scales and zero points of a graph's quantised values."""

from __future__ import annotations

import math

import numpy as np
import onnx

from headrace.kernels.requantise import Quantised, check_scale
from headrace.networks.graph import Graph
from headrace.networks.operation import BYTES

SIGNED_ZERO = 128  # added to int8 values


def added(elem_type: int) -> int:
    """What is added to values of a type, modulo 256, so that they are unsigned."""
    return SIGNED_ZERO if elem_type == onnx.TensorProto.INT8 else 0


def quantisation(graph: Graph, scale: str, zero: str, elem_type: int) -> Quantised | None:
    """Of a value of uint8 or int8 with one scale; None: it has several, or they are no constants.

    Args:
        scale, zero: names; "" of a zero point: none, which is 0.
        elem_type: of the value.
    """
    if elem_type not in BYTES or scale not in graph.constants:
        return None
    if zero and zero not in graph.constants:
        return None
    factor = graph.constants.array(scale).reshape(-1)
    if factor.dtype != np.float32 or factor.size != 1 or not check_scale(float(factor[0])):
        return None
    offset = graph.constants.array(zero).reshape(-1) if zero else np.zeros(1, np.int8)
    if offset.size != 1:
        return None
    return Quantised(float(factor[0]), int(offset[0]) + added(elem_type))


def named(names: list[str], index: int) -> str:
    """An input of a node; "": it is left out."""
    return names[index] if len(names) > index else ""


def elem_type(graph: Graph, name: str) -> int:
    """Of a value or constant; 0: not known."""
    of = graph.type(name)
    return 0 if of is None else of.elem_type


def int8_weights(
    graph: Graph, name: str, scale: str, zero: str, axis: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Quantised weights with the zero point taken away, as int8 in -127..127, and their scales.

    Args:
        axis: of the channels that are written.

    Returns:
        Weights and float32 scales, one for each channel; None: they are something else.
    """
    constants = graph.constants
    if name not in constants or scale not in constants or (zero and zero not in constants):
        return None
    if constants.type(name).elem_type not in BYTES:
        return None
    shapes = [constants.type(one).shape or () for one in (scale, zero) if one]
    if any(shape and shape[-1] != math.prod(shape) for shape in shapes):
        return None  # they go along another dimension
    w, factors = constants.array(name), constants.array(scale).reshape(-1)
    offsets = constants.array(zero).reshape(-1) if zero else np.zeros(1, np.int8)
    n = w.shape[axis]
    if factors.dtype != np.float32 or factors.size not in (1, n) or offsets.size not in (1, n):
        return None
    shape = [1] * w.ndim
    shape[axis] = -1
    whole = w.astype(np.int16)
    whole -= offsets.astype(np.int16).reshape(shape)
    if not np.isfinite(factors).all() or whole.size == 0:
        return None
    if whole.max() > 127 or whole.min() < -127:
        return None
    return whole.astype(np.int8), np.broadcast_to(factors, n).astype(np.float32)
