"""Reshapes, transpositions, slices, pads and joins that only move whole runs of channels: one copy.

Windows of images, also of rolled ones, and what merges four pixels into one (Swin, 2103.14030);
states of both directions of a recurrent layer beside each other; batches that change places with
steps. What is between may have any number of dimensions: places are numbers of runs, on which the
nodes are tried, from the farthest value on that channels can be followed from. Where channels are
joined with other dimensions on the way (patches of MobileViT, 2110.02178), elements are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import onnx

from headrace.kernels.taking import NOWHERE
from headrace.networks.as_rows import TO_IMAGES, TO_ROWS
from headrace.networks.graph import Graph, Node, TensorType
from headrace.networks.operators import MALFORMED, operation_for
from headrace.networks.operators.taking import places_of_slice
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.quantisation import named

OP = "TakeRuns"
OPS = (OP, "Transpose", "Reshape", "Identity")  # that are made here
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_MOVES = (*_RESHAPES, "Transpose", "Slice", "Pad", "Concat")
LEAST_RUN = 4  # channels
MOST_RUNS = 1 << 22
MOST_ELEMENTS = 1 << 20  # of values whose elements are followed one by one
MOST_MOVES = 64  # behind each other
_RANKS = (2, 3, 4)
_TURNS = {3: ([0, 2, 1], [0, 2, 1]), 4: (TO_ROWS, TO_IMAGES)}  # to rows and back


class _Runs(NamedTuple):
    """A value's runs: their numbers, in its shape, where one dimension counts runs of channels.

    Attributes:
        axis: that dimension; None: these are elements, and any.
    """

    numbers: np.ndarray
    axis: int | None


class _TooLongError(Exception):
    """Runs have to be shorter to be moved whole: of this many channels."""

    def __init__(self, run: int) -> None:
        super().__init__(run)
        self.run = run


def found(
    matcher: Matcher, node: Node, refused: Collection[tuple[str, str]] = ()
) -> list[Node] | None:
    """headrace.TakeRuns in place of the last of these nodes, with transpositions where needed.

    Args:
        refused: what it would read and make, where that is known not to run.
    """
    if not _is_move(node) or not _is_last(matcher, node):
        return None
    y = node.outputs[0]
    shape = matcher.shape(y) or ()
    if len(shape) not in _RANKS or not _is_float(matcher, y) or not math.prod(shape):
        return None
    values = list(_values_behind(matcher, y))
    moved = [matcher.makers[y], *(matcher.makers[n] for n in values[:-1])]
    if all(operation_for(matcher.graph, one) is not None for one in moved):
        return None
    for x in reversed(values):
        for axis in (len(matcher.shape(x) or ()) - 1, 1):
            made = _from(matcher, x, axis, y)
            if made and not _is_refused(made, refused) and _is_other(made, moved):
                return made
    return None


def not_running(graph: Graph) -> set[tuple[str, str]]:
    """What is read and made where no kernel of ours does it, or the turn before or behind it."""
    users, found = graph.users(), set()
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    for node in graph.nodes:
        if node.op != OP:
            continue
        x, y = node.inputs[0], node.outputs[0]
        beside = [one for one in (makers.get(x), *users.get(y, [])) if one is not None]
        turns = [one for one in beside if one.ours_alone and one.op == "Transpose"]
        if any(operation_for(graph, one) is None for one in (node, *turns)):
            found.add((x, y))
    return found


def _is_move(node: Node) -> bool:
    return not node.domain and node.op in _MOVES and len(node.outputs) == 1


def _is_last(matcher: Matcher, node: Node) -> bool:
    """Whether somebody wants what it makes for something else."""
    y = node.outputs[0]
    users = matcher.users.get(y, [])
    return y in matcher.graph.outputs or not all(_is_move(one) for one in users)


def _is_float(matcher: Matcher, name: str) -> bool:
    of = matcher.graph.type(name)
    return of is not None and of.elem_type == onnx.TensorProto.FLOAT


def _values_behind(matcher: Matcher, name: str) -> Iterator[str]:
    """What a value is made of by moves, the nearest first."""
    for _ in range(MOST_MOVES):
        node = matcher.makers.get(name)
        if node is None or not _is_move(node):
            return
        name = node.inputs[0]
        if name in matcher.graph.constants or not _is_float(matcher, name):
            return
        yield name


def _is_refused(nodes: list[Node], refused: Collection[tuple[str, str]]) -> bool:
    return any((one.inputs[0], one.outputs[0]) in refused for one in nodes if one.op == OP)


def _is_other(nodes: list[Node], moved: list[Node]) -> bool:
    """Whether they are not those that are there."""
    return len(moved) > 1 or [one.op for one in nodes] != [one.op for one in moved]


def _from(matcher: Matcher, x: str, axis: int, y: str) -> list[Node] | None:
    """Nodes that make y of x, whose channels are this dimension; None: runs do not stay whole."""
    read = matcher.shape(x) or ()
    if len(read) not in _RANKS or not math.prod(read) or not 0 < axis < len(read):
        return None
    run = read[axis]
    while run >= LEAST_RUN:
        try:
            runs = _followed(matcher, x, axis, y, run)
        except _TooLongError as error:
            run = error.run
            continue
        except MALFORMED:
            return None
        if runs is not None:
            return _nodes(matcher, x, axis, y, runs, run)
        break
    return _by_elements(matcher, x, axis, y)


def _by_elements(matcher: Matcher, x: str, axis: int, y: str) -> list[Node] | None:
    """The same, where runs come together again that were not whole on the way."""
    read, made = matcher.shape(x) or (), matcher.shape(y) or ()
    if max(math.prod(read), math.prod(made)) > MOST_ELEMENTS:
        return None
    found = _followed(matcher, x, axis, y, 1)
    if found is None:
        return None
    for back in (len(made) - 1, 1):
        numbers = np.moveaxis(found.numbers, back, -1)
        run = math.gcd(read[axis], made[back])
        if run < LEAST_RUN:
            continue
        parts = numbers.reshape(*numbers.shape[:-1], -1, run)
        first, nowhere = parts[..., 0], (parts == NOWHERE).all(-1)
        whole = (np.diff(parts) == 1).all(-1) & (first % run == 0)
        if (whole | nowhere).all():
            first = np.where(nowhere, NOWHERE, first // run)
            return _nodes(matcher, x, axis, y, _Runs(np.moveaxis(first, -1, back), back), run)
    return None


def _followed(matcher: Matcher, x: str, axis: int, y: str, run: int) -> _Runs | None:
    """Where runs of x come to lie in y; None: that is not known, or something else comes in.

    Args:
        run: channels of each; 1: of elements, wherever they go.
    """
    shape = matcher.shape(x) or ()
    if math.prod(shape) // run > MOST_RUNS:
        return None
    rows = [*(n for i, n in enumerate(shape) if i != axis), shape[axis] // run]
    numbers = np.arange(math.prod(rows), dtype=np.int32).reshape(rows)
    at = np.moveaxis(numbers, -1, axis)
    known: dict[str, _Runs | None] = {x: _Runs(at, axis if run > 1 else None)}

    def of(name: str, left: int = MOST_MOVES) -> _Runs | None:
        if name not in known:
            known[name] = made(name, left) if left else None
        return known[name]

    def made(name: str, left: int) -> _Runs | None:
        node = matcher.makers.get(name)
        if node is None or not _is_move(node) or name in matcher.graph.constants:
            return None
        parts = [one for name in node.inputs[: _joins(node)] if (one := of(name, left - 1))]
        if len(parts) < _joins(node):
            return None
        joins = node.op == "Concat"
        moved = _joined(node, parts) if joins else _moved(matcher, node, parts[0], run)
        return None if moved is None or moved.numbers.size > MOST_RUNS else moved

    return of(y)


def _joins(node: Node) -> int:
    """How many of its inputs it moves."""
    return len(node.inputs) if node.op == "Concat" else 1


def _joined(node: Node, parts: list[_Runs]) -> _Runs | None:
    if len({one.axis for one in parts}) > 1:
        return None
    axis = node.attribute("axis")
    return _Runs(np.concatenate([one.numbers for one in parts], axis), parts[0].axis)


def _moved(matcher: Matcher, node: Node, runs: _Runs, run: int) -> _Runs | None:
    at, axis = runs
    if node.op == "Transpose":
        perm = node.attribute("perm", list(range(at.ndim))[::-1])
        return _Runs(at.transpose(perm), None if axis is None else perm.index(axis))
    if node.op == "Slice":
        places = places_of_slice(matcher.graph, node)
        for i, numbers in (places or {}).items():
            at = at.take(_whole_runs(numbers, run) if i == axis else numbers, i)
        return None if places is None else _Runs(at, axis)
    if node.op == "Pad":
        return _padded(matcher, node, runs)
    return _reshaped(runs, matcher.shape(node.outputs[0]) or (), run)


def _whole_runs(channels: np.ndarray, run: int) -> np.ndarray:
    """Numbers of the runs that a slice of channels takes."""
    if len(channels) > 1 and (np.diff(channels) != 1).any():
        raise _TooLongError(1)
    shorter = math.gcd(run, int(channels[0]), len(channels))
    if shorter < run:
        raise _TooLongError(shorter)
    return np.arange(channels[0] // run, (channels[-1] + 1) // run)


def _padded(matcher: Matcher, node: Node, runs: _Runs) -> _Runs | None:
    """With zeros, of no channels."""
    given, value, axes = (named(node.inputs, i) for i in (1, 2, 3))
    constants = matcher.graph.constants
    if given not in constants or axes or node.attribute("mode", b"constant") != b"constant":
        return None
    if value and not matcher.is_scalar(value, 0.0):
        return None
    pads = constants.array(given).reshape(2, -1)
    grown = math.prod(np.add(runs.numbers.shape, pads.sum(0)).tolist())
    if (pads < 0).any() or grown > MOST_RUNS:
        return None
    if runs.axis is not None and pads[:, runs.axis].any():
        return None
    return _Runs(np.pad(runs.numbers, pads.T, constant_values=NOWHERE), runs.axis)


def _reshaped(runs: _Runs, shape: tuple[int, ...], run: int) -> _Runs | None:
    """Where as many elements are behind the channels as were; of several such dimensions, any."""
    at, axis = runs
    if axis is None:
        return _Runs(at.reshape(shape), None)
    behind = math.prod(at.shape[axis + 1 :])
    shorter = []
    for i in reversed(range(len(shape))):
        if math.prod(shape[i + 1 :]) == behind:
            if shape[i] % run == 0:
                counts = (*shape[:i], shape[i] // run, *shape[i + 1 :])
                return _Runs(at.reshape(counts), i)
            shorter.append(math.gcd(run, shape[i]))
    if shorter:
        raise _TooLongError(max(shorter))
    return None


def _nodes(
    matcher: Matcher, x: str, axis: int, y: str, runs: _Runs, run: int
) -> list[Node] | None:  # fmt: skip
    """Channels become innermost, runs move, and channels go where y has them, as far as needed."""
    read, made = matcher.shape(x) or (), matcher.shape(y) or ()
    if runs.axis not in (1, len(made) - 1):
        return None
    numbers = np.moveaxis(runs.numbers, runs.axis, -1)
    first = (*read[:axis], *read[axis + 1 :], read[axis])
    last = (*numbers.shape[:-1], numbers.shape[-1] * run)
    steps: list[tuple[str, tuple[int, ...], dict[str, object]]] = []
    if axis != len(read) - 1:
        steps.append(("Transpose", first, {"perm": _TURNS[len(read)][0]}))
    whole = np.array_equal(numbers.reshape(-1), np.arange(math.prod(read) // run))
    if not whole or first[-1] != last[-1]:
        steps.append((OP, last, {"run": run}))
    elif first != last:
        if {len(first), len(last)} <= {2, 4}:  # rows of three dimensions become those of any other
            steps.append(("Reshape", (1, math.prod(last[:-1]), last[-1]), {}))
        steps.append(("Reshape", last, {}))
    if runs.axis != len(made) - 1:
        steps.append(("Transpose", made, {"perm": _TURNS[len(made)][1]}))
    steps = steps or [("Identity", made, {})]
    nodes = []
    for i, (op, shape, attributes) in enumerate(steps):
        name = y if i == len(steps) - 1 else matcher.new_value(y, f"{i} of {x}", shape)
        inputs, domain = [x], ""
        if op == "Reshape":
            inputs.append(matcher.new_constant(np.array(shape)))
        elif op == OP:
            inputs.append(_table(matcher, f"{name}/headrace/runs of {x}", numbers))
            domain = "headrace"
        nodes.append(new_node(op, inputs, name, domain, **attributes))
        x = name
    return nodes


def _table(matcher: Matcher, name: str, numbers: np.ndarray) -> str:
    """A constant [rows, runs]: not small ones alone, so that its content is not its name."""
    held = np.ascontiguousarray(numbers.reshape(-1, numbers.shape[-1]), np.int32)
    of = TensorType(onnx.TensorProto.INT32, held.shape)
    matcher.graph.constants.derive(name, of, (), lambda: held)
    return name


# For the table in docs/onnx.md: which of them.
WHICH = {
    "Reshape, Squeeze, Unsqueeze, Transpose, Slice, Pad, Concat": (
        "several of them, of any number of dimensions between, that together move runs of at least "
        "4 channels: windows of images, merged pixels, both directions of LSTM and GRU side by "
        "side, batches and steps in each other's place"
    ),
}
