"""Quantised networks with numbers in them: what codes do not say is computed in float32.

A layer is one of codes if all that it reads and makes are codes. Others read and make float32:
`Conversion` is between them. A function of codes reads numbers of a table, and a fully connected
layer whose codes nobody knows makes int32 sums, which stay so at a network's end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headrace.micro.int8.pool import changes_codes_of_windows
from headrace.micro.network import (
    UNBOUNDED,
    Activation,
    Codes,
    Concatenation,
    Conversion,
    Convolution,
    Depthwise,
    Layer,
    Padding,
    Pool,
    Port,
    Sums,
    Value,
    View,
)

_GREATEST = 127
_LEAST_FACTOR = 2.0**-8  # of an output's code: less than this changes none
_MOST_BIAS = 2**24  # in units of products


def mixed(
    layers: Sequence[Layer], inputs: Sequence[Port], outputs: Sequence[Port]
) -> tuple[tuple[Layer, ...], tuple[Port, ...], tuple[Port, ...]]:
    """Layers of a network that has codes, and its inputs and outputs."""
    read = {value.name for layer in layers for value in layer.reads}
    of = _Mixing({port.value.name for port in outputs} - read)
    for port in inputs:
        of.put(port.value)
    for layer in _in_codes_earlier(layers, {port.value.name for port in outputs}):
        of.take(layer)
    given, made = ([replace(p, value=of.known[p.value.name]) for p in ends]
                   for ends in (inputs, outputs))  # fmt: skip
    return tuple(of.layers), tuple(given), tuple(made)


def _in_codes_earlier(layers: Sequence[Layer], outputs: set[str]) -> list[Layer]:
    """What is quantised behind a layer that only chooses or moves numbers, in front of it.

    Codes are in the order of their numbers, so that the greatest stays that.
    """
    readers = Counter(value.name for layer in layers for value in layer.reads)
    earlier: dict[str, Codes] = {}

    def known(value: Value) -> Value:
        return replace(value, codes=earlier[value.name]) if value.name in earlier else value

    found: list[Layer] = []
    for layer in reversed(layers):
        makes = known(layer.makes)
        moves = isinstance(layer, (Concatenation, Padding, View))
        if makes.codes and (moves or (isinstance(layer, Pool) and layer.kind == "most")):
            for value in layer.reads:
                alone = readers[value.name] == 1 and value.name not in outputs
                if value.codes is None and alone:
                    earlier[value.name] = makes.codes
        found.append(replace(layer, reads=tuple(map(known, layer.reads)), makes=makes))
    return found[::-1]


def _is_of_codes(layer: Layer) -> bool:
    if layer.makes.codes is None or any(value.codes is None for value in layer.reads):
        return False
    if isinstance(layer, (Convolution, Depthwise)):
        return layer.scales is not None
    return not (isinstance(layer, Pool) and changes_codes_of_windows(layer))


def _in_numbers(layer: Layer) -> Layer:
    """The same with weights of numbers."""
    if not isinstance(layer, (Convolution, Depthwise)) or layer.scales is None:
        return layer
    (read,) = layer.reads
    assert read.codes is not None
    scales = np.broadcast_to(layer.scales, layer.bias.shape).astype(np.float32)
    by_made = scales.reshape(-1, 1, 1, 1) if isinstance(layer, Convolution) else scales
    bias = layer.bias * (np.float64(np.float32(read.codes.scale)) * scales)
    weights = layer.weights * by_made
    return replace(layer, weights=weights, bias=bias.astype(np.float32), scales=None)


def _in_codes(layer: Layer) -> Layer:
    """A factor and a bias for each channel of codes: its scales are what is multiplied by.

    Weights are the greatest codes, so that units of the bias are small.
    """
    if not isinstance(layer, Depthwise) or layer.scales is not None or layer.makes.codes is None:
        return layer
    (read,), factor = layer.reads, layer.weights.reshape(-1).astype(np.float64)
    if read.codes is None or not layer.windows.is_pixelwise or read.shape != layer.makes.shape:
        return layer
    least = layer.makes.codes.scale / read.codes.scale * _LEAST_FACTOR
    scales = (np.maximum(np.abs(factor), least) / _GREATEST).astype(np.float32)
    units = np.float64(np.float32(read.codes.scale)) * scales
    weights = np.rint(factor / scales).astype(np.int8)
    bias = np.rint(layer.bias / units)
    if (np.abs(bias) > _MOST_BIAS).any():
        return layer
    whole = bias.astype(np.int32)
    return replace(layer, weights=weights.reshape(1, 1, -1), scales=scales, bias=whole)


class _Mixing:
    """Layers while they are looked at.

    Args:
        ends: names of values that nobody reads.

    Attributes:
        layers: so far.
        known: values by name, as they are now.
    """

    def __init__(self, ends: set[str]) -> None:
        self.layers: list[Layer] = []
        self.known: dict[str, Value] = {}
        self._ends = ends
        self._numbers: dict[str, Value] = {}  # of codes, by name

    def put(self, value: Value) -> Value:
        """A value as it is from now on: a number is float32."""
        found = value if value.codes or value.sums is not None else replace(value, wide=True)
        self.known[value.name] = found
        return found

    def take(self, layer: Layer) -> None:
        """A layer, with what it needs around it."""
        reads = tuple(self.known[value.name] for value in layer.reads)
        layer = _in_codes(replace(layer, reads=reads))
        if isinstance(layer, Concatenation) and layer.makes.codes and all(v.codes for v in reads):
            codes = layer.makes.codes
            reads = tuple(self._recoded(value, codes) for value in reads)
            layer = replace(layer, reads=reads)
        if isinstance(layer, View) and layer.makes.codes and not reads[0].codes:
            layer = replace(layer, reads=(self._quantised(reads[0], layer.makes.codes),))
        if isinstance(layer, (View, Conversion)):
            self.layers.append(replace(layer, makes=self.put(layer.makes)))
        elif _is_of_codes(layer):
            self.put(layer.makes)
            self.layers.append(layer)
        elif isinstance(layer, Activation) and reads[0].codes and not layer.makes.codes:
            self.layers.append(replace(layer, makes=self.put(layer.makes)))
        elif isinstance(layer, Convolution) and layer.is_of_sums:
            self._sums(layer)
        else:
            reads = tuple(self._number(value) for value in reads)
            self._made(replace(_in_numbers(layer), reads=reads))

    def _number(self, value: Value) -> Value:
        if value.codes is None:
            return value
        if value.name not in self._numbers:
            made = Value(f"{value.name}/numbers", value.shape, None, wide=True)
            self.layers.append(Conversion(made.name, (value,), made))
            self._numbers[value.name] = made
        return self._numbers[value.name]

    def _quantised(self, value: Value, codes: Codes) -> Value:
        """A number in codes."""
        made = Value(f"{value.name}/{len(self.layers)}", value.shape, codes)
        self.layers.append(Conversion(made.name, (value,), made))
        return made

    def _recoded(self, value: Value, codes: Codes) -> Value:
        """A value in other codes."""
        if value.codes == codes:
            return value
        made = Value(f"{value.name}/{len(self.layers)}", value.shape, codes)
        self.layers.append(Activation(made.name, (value,), made, "identity"))
        return made

    def _made(self, layer: Layer) -> None:
        """A layer of numbers, whose result may be wanted in codes."""
        made = self.put(layer.makes)
        if made.codes is None:
            self.layers.append(replace(layer, makes=made))
            return
        number = Value(f"{made.name}/before codes", made.shape, None, wide=True)
        self.layers.append(replace(layer, makes=number))
        self.layers.append(Conversion(f"{layer.name}/codes", (number,), made))

    def _sums(self, layer: Convolution) -> None:
        (read,), made = layer.reads, layer.makes
        assert read.codes is not None and layer.scales is not None
        scales = np.float64(np.float32(read.codes.scale)) * layer.scales
        ends = made.name in self._ends and layer.bounds == UNBOUNDED
        name = made.name if ends else f"{made.name}/sums"
        sums = Value(name, made.shape, None, scales.astype(np.float32))
        weights = layer.weights.reshape(len(layer.weights), -1)
        self.layers.append(Sums(layer.name, layer.reads, sums, weights, layer.bias))
        if ends:
            self.put(sums)
            return
        made = self.put(made)
        bounded = layer.bounds != UNBOUNDED
        number = replace(made, name=f"{made.name}/numbers") if bounded else made
        self.layers.append(Conversion(f"{layer.name}/numbers", (sums,), number))
        if bounded:
            kept = Activation(f"{layer.name}/bounds", (number,), made, "identity", layer.bounds)
            self.layers.append(kept)
