"""Codes and sums as float32, and float32 as codes: what is between layers of either."""

from __future__ import annotations

import numpy as np

from headrace.micro.int8.codes import LEAST, codes_of
from headrace.micro.kernels import convert, lookup_single
from headrace.micro.lowered import At, Lowered, Step
from headrace.micro.network import Conversion, Value
from headrace.targets.target import Target


def table(value: Value) -> np.ndarray:
    """What each code of a value from -128 on stands for: float32 [256]."""
    codes = codes_of(value)
    whole = np.arange(256) + LEAST - codes.zero
    found: np.ndarray = whole.astype(np.float32) * np.float32(codes.scale)
    return found


def _scales(layer: Conversion) -> np.ndarray:
    sums = layer.reads[0].sums
    assert sums is not None
    return np.ascontiguousarray(np.broadcast_to(sums, layer.makes.elements), np.float32)


def computed(layer: Conversion, target: Target, x: np.ndarray) -> np.ndarray:
    """What a chip computes, bit for bit."""
    read, made = layer.reads[0], layer.makes
    if made.codes is not None:
        found = convert.to_codes_reference(x, made.codes.scale, made.codes.zero)
    elif read.sums is not None:
        found = convert.of_sums_reference(x.reshape(-1), _scales(layer))
    else:
        found = table(read)[x.astype(np.int64) - LEAST]
    return found.reshape(made.shape)


def lowered(layer: Conversion, target: Target) -> Lowered:
    """One step."""
    read, made = layer.reads[0], layer.makes
    x, y, n, name = At(read.name), At(made.name), made.elements, f"{layer.name}/numbers"
    if made.codes is not None:
        slots = (x, y, n, made.codes.scale, made.codes.zero)
        return Lowered((Step(convert.TO_CODES, slots),), over=(read.name,))
    if read.sums is not None:
        step = Step(convert.OF_SUMS, (x, At(name), y, n))
        return Lowered((step,), {name: _scales(layer)}, over=(read.name,))
    return Lowered((Step(lookup_single.NAME, (x, At(name), y, n)),), {name: table(read)})
