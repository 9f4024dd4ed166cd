"""LSTM and GRU: what gates get of the inputs of all steps is one product, then step follows step.

Not those with other activations, peepholes, clips or lengths of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx

from headrace.kernels.geometry import Geometry
from headrace.kernels.recurrent import GRU, LSTM, tiled_states
from headrace.networks.graph import Constants, Graph, Node
from headrace.networks.operation import PADDED, Addresses, Image, Operation, Weight, image_of
from headrace.networks.operators.convolution import convolution
from headrace.networks.quantisation import named

_DIRECTIONS = {b"forward": (1, 0), b"reverse": (1, 1), b"bidirectional": (2, 0)}
_USUAL = {LSTM: [b"Sigmoid", b"Tanh", b"Tanh"], GRU: [b"Sigmoid", b"Tanh"]}


class _Sizes(NamedTuple):
    """Of a layer."""

    gates: int
    directions: int
    backwards: int
    steps: int
    sequences: int
    read: int
    n: int

    @property
    def padded(self) -> int:
        return -(-self.n // PADDED) * PADDED

    @property
    def states(self) -> Image:
        """How states of all directions and sequences lie."""
        return Image(self.directions * self.sequences, 1, 1, self.n)


def _sizes(graph: Graph, node: Node, gates: int) -> _Sizes | None:
    x, y = node.inputs[0], named(node.outputs, 0)
    shape, n = graph.shape(x), node.attribute("hidden_size", 0)
    found = _DIRECTIONS.get(node.attribute("direction", b"forward"))
    if shape is None or len(shape) != 3 or math.prod(shape) == 0 or found is None:
        return None
    if n < 1:
        return None
    if x in graph.constants or image_of(graph, x) is None or x in graph.channels_first:
        return None
    if named(node.inputs, 4) or named(node.inputs, 7) or node.attribute("layout", 0):
        return None
    usual = node.attribute("activations", [])
    if [one.lower() for one in usual] not in ([], [a.lower() for a in _USUAL[gates]] * found[0]):
        return None
    if node.attribute("clip") is not None or node.attribute("input_forget", 0):
        return None
    if y and y not in graph.as_rows:
        return None
    of = _Sizes(gates, *found, shape[0], shape[1], shape[2], n)
    constants = {
        node.inputs[1]: (of.directions, gates * n, of.read),
        node.inputs[2]: (of.directions, gates * n, n),
        named(node.inputs, 3): (of.directions, 2 * gates * n),
    }
    first = {named(node.inputs, i): (of.directions, of.sequences, n) for i in (5, 6)}
    for name, wanted in (constants | first).items():
        if name in graph.constants:
            type_ = graph.constants.type(name)
            if type_.shape != wanted or type_.elem_type != onnx.TensorProto.FLOAT:
                return None
        elif name and (name in constants or image_of(graph, name) != of.states):
            return None
    return of


def _recurrent(gates: int) -> Callable[[Graph, Node], Operation | None]:
    def made(graph: Graph, node: Node) -> Operation | None:
        of = _sizes(graph, node, gates)
        if of is None:
            return None
        product, beside = _product(graph, node, of)
        y, h, c = (
            named(node.outputs, i) or _inner(node, role)
            for i, role in enumerate(("states", "state", "cells"))
        )
        product.also = [_start(graph, named(node.inputs, 5), h, of.states)]
        resets_last = gates == GRU and bool(node.attribute("linear_before_reset", 0))
        if gates == LSTM:
            product.also.append(_start(graph, named(node.inputs, 6), c, of.states))
        elif not resets_last:  # room, for the update and what is reset
            rows = replace(of.states, images=2 * of.states.images)
            product.also.append(_start(graph, "", c, rows))
        states = Image(of.steps * of.directions * of.sequences, 1, 1, of.n)
        reads = [product.makes, h] if resets_last else [product.makes, h, c]
        weight = _states(graph.constants, node.inputs[2], of)

        def slots(one: Operation, at: Addresses) -> list[Any]:
            return [
                at[one.reads[0]], at.own["states"], at[one.makes], at[h],
                at.own["beside"] if resets_last else at[c], of.steps, of.sequences, of.directions,
                of.n, of.backwards,
            ]  # fmt: skip

        own: dict[str, np.ndarray | Weight] = {"states": weight}
        if resets_last:
            own["beside"] = beside
        macs = of.steps * of.sequences * of.directions * gates * of.n * of.n
        of_gru = "gru_f32" if resets_last else "gru_reset_first_f32"
        kernel = "lstm_f32" if gates == LSTM else of_gru
        product.also.append(Operation(kernel, reads, y, slots, [], own, macs=macs, image=states))
        return product

    return made


def _product(graph: Graph, node: Node, of: _Sizes) -> tuple[Operation, np.ndarray]:
    """What gates get of inputs, and what the hidden gate of GRU gets with its state's product."""
    constants, rows = graph.constants, of.steps * of.sequences
    shape = of.directions, of.gates, of.n
    columns = of.directions * of.gates * of.padded
    bias, beside = np.zeros((2, *shape), np.float32)
    name = named(node.inputs, 3)
    if name:
        bias, beside = constants.array(name).reshape(of.directions, 2, *shape[1:]).swapaxes(0, 1)
    if of.gates == LSTM or not node.attribute("linear_before_reset", 0):
        bias = bias + beside
    else:
        bias = np.concatenate([bias[:, :2] + beside[:, :2], bias[:, 2:]], axis=1)

    def padded(a: np.ndarray) -> np.ndarray:
        return np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, of.padded - of.n)])

    def weights() -> np.ndarray:
        w = constants.array(node.inputs[1]).reshape(*shape, of.read)
        found: np.ndarray = padded(w.transpose(3, 0, 1, 2)).reshape(1, 1, of.read, columns)
        return found

    key = constants.identity(node.inputs[1])
    row = Image(1, 1, rows, of.read), Image(1, 1, rows, columns)
    product = convolution(
        node, Geometry(1, (1, rows), (1, rows), (1, 1)), row, (of.read, columns), weights,
        None if key is None else (key, "gates"), padded(bias).reshape(-1), constants,
    )  # fmt: skip
    product.makes = _inner(node, "gates")
    product.image, product.windows = row[1], None
    return product, padded(beside[:, -1])


def _inner(node: Node, role: str) -> str:
    """The name of a value on the way; names of nodes need not differ, those of values do."""
    return f"{next(filter(None, node.outputs))}/headrace/{role}"


def _states(constants: Constants, name: str, of: _Sizes) -> Weight:
    key = constants.identity(name)
    n_bytes = 4 * of.directions * of.padded * of.n * of.gates
    return Weight(
        n_bytes,
        lambda: tiled_states(constants.array(name), of.gates),
        None if key is None else ("recurrent", key),
    )


def _start(graph: Graph, given: str, makes: str, states: Image) -> Operation:
    """The state before the first step, which later steps change where it lies."""
    own: dict[str, np.ndarray | Weight] = {}
    if given in graph.constants:
        array = graph.constants.array(given)
        own["given"] = np.pad(array, ((0, 0), (0, 0), (0, states.padded - states.channels)))
    reads = [given] if given and given not in graph.constants else []

    def slots(one: Operation, at: Addresses) -> list[Any]:
        x = at[one.reads[0]] if one.reads else at.own["given"] if own_given else 0
        return [x, at[one.makes], states.n_bytes // 64]

    own_given = bool(own)
    return Operation("recurrent_start", reads, makes, slots, [], own, image=states)


OPERATORS = {"LSTM": _recurrent(LSTM), "GRU": _recurrent(GRU)}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "LSTM, GRU": (
        "one or both directions, usual activations, constant weights, whole sequences; states "
        "of all steps where they are squeezed, reshaped, turned or given out"
    ),
}
