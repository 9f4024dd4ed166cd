"""A file's inputs and outputs as a chip has them: codes or halves, channels last, no batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from headrace.micro.network import UNSIGNED_ZERO, MicroNetwork, Port


def to_chip(network: MicroNetwork, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a file's inputs, by name, as arrays of values.

    Raises:
        ValueError: one is missing, unknown, of another shape or type, or has NaN for codes.
    """
    unknown = set(inputs) - {port.name for port in network.inputs}
    if unknown:
        names = ", ".join(port.name for port in network.inputs)
        raise ValueError(f"there is no input {sorted(unknown)[0]!r}; the network takes {names}")
    return {port.value.name: _to_chip(port, inputs) for port in network.inputs}


def _to_chip(port: Port, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    if port.name not in inputs:
        raise ValueError(f"the input {port.name!r} is missing")
    array = np.asarray(inputs[port.name])
    if array.shape != port.shape:
        raise ValueError(f"{port.name} is {list(array.shape)}, and {list(port.shape)} is wanted")
    if array.dtype.kind != "f" if port.is_real else array.dtype != port.type:
        raise ValueError(f"{port.name} is {array.dtype}, and {port.type} is wanted")
    image = lying(port, array)
    codes = port.value.codes
    if codes is None:
        return image.astype(port.value.dtype)
    if not port.is_real:
        found: np.ndarray = (image ^ UNSIGNED_ZERO).view(np.int8) if port.is_unsigned else image
        return found
    with np.errstate(over="ignore"):  # in float32, as chips and onnxruntime divide
        whole: np.ndarray = np.rint(image.astype(np.float32) / np.float32(codes.scale))
    if np.isnan(whole).any():
        raise ValueError(f"{port.name} has NaN, which no code stands for")
    return (whole.clip(-256, 256) + codes.zero).clip(-128, 127).astype(np.int8)


def lying(port: Port, array: np.ndarray) -> np.ndarray:
    """Elements in a file's order as they lie on the chip: in the shape of the port's value."""
    if port.channels_first:
        rows, columns, channels = port.value.image
        array = array.reshape(channels, rows, columns).transpose(1, 2, 0)
    return np.ascontiguousarray(array).reshape(port.value.shape)


def from_chip(network: MicroNetwork, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of outputs as the file has them, by the outputs' names."""
    return {port.name: _from_chip(port, values[port.value.name]) for port in network.outputs}


def _from_chip(port: Port, value: np.ndarray) -> np.ndarray:
    codes = port.value.codes
    if port.value.sums is not None:
        value = (value.astype(np.float64) * port.value.sums).astype(np.float32)
    elif codes is None:
        value = value.astype(np.float32)
    elif port.is_real:
        value = ((value.astype(np.float64) - codes.zero) * codes.scale).astype(np.float32)
    elif port.is_unsigned:
        value = value.view(np.uint8) ^ UNSIGNED_ZERO
    if port.channels_first:
        value = value.reshape(port.value.image).transpose(2, 0, 1)
    return value.reshape(port.shape)


def about(port: Port) -> str:
    """What a port is on the chip, for people who write C."""
    codes, shape = port.value.codes, list(port.value.shape)
    what = "float32" if port.value.wide else "halves (IEEE 754 binary16)"
    if port.value.sums is not None:
        what = "int32 sums of products: their order is that of numbers, if scales are alike"
    elif codes is not None:
        what = f"codes; a number is (code - {codes.zero}) * {codes.scale!r}"
    order = ", channels last" if len(shape) == 3 else ""
    return f"{port.name}: {shape}{order}, {what}"
