"""Attention as exporters spell it: projections are reshaped and transposed into heads, and back.

Whichever way the dimensions go: the shuffles are tried on the places of the elements, and taken if
these end where attention has them. Queries, keys and values may be parts of one value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx

from headrace.networks.graph import Node, TensorType
from headrace.networks.operators.softmax import axis_of
from headrace.networks.operators.taking import places_of_slice
from headrace.networks.patterns import dynamic
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.quantisation import named

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")
_PARTS = ("Split", "Slice", "Gather")
MOST_MASKS = 2
MOST_ELEMENTS = 1 << 22  # of a value whose shuffle is tried
MOST_MOVES = 64  # behind each other


@dataclass(frozen=True)
class _Source:
    """Where a value comes from by shuffles and factors, the first of these moves first."""

    name: str
    moves: tuple[_Move, ...]
    factor: float


class _Move(NamedTuple):
    """A node that gives elements of its first input, and which of its outputs is meant."""

    node: Node
    makes: str


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.Attention in place of the last shuffle."""
    if node.domain or node.op not in ("Reshape", "Transpose"):
        return None
    shape = matcher.shape(node.outputs[0])
    if shape is None or len(shape) not in (2, 3):
        return None
    mixed = _source(matcher, node.outputs[0], factors=False)
    product = matcher.maker(mixed.name, "MatMul")
    inner = matcher.shape(mixed.name)
    if product is None or inner is None or len(inner) != 4:
        return None
    weights, zeros = product.inputs[0], False
    guard = matcher.maker(weights, "Where")
    if guard is not None:  # PyTorch's: what is no number becomes 0
        asked = matcher.maker(guard.inputs[0], "IsNaN")
        if asked is None or not matcher.is_scalar(guard.inputs[1], 0.0):
            return None
        if asked.inputs[0] != guard.inputs[2]:
            return None
        weights, zeros = guard.inputs[2], True
    softmax = matcher.maker(weights, "Softmax")
    scores = None if softmax is None else matcher.shape(softmax.inputs[0])
    if softmax is None or scores is None or len(scores) != 4:
        return None
    if axis_of(matcher.graph, softmax, scores) != 3:
        return None
    read = _scores(matcher, softmax.inputs[0])
    if read is None:
        return None
    q, k, masks, scale = read
    v = _source(matcher, product.inputs[1], factors=False)
    mask, nodes = masks[0] if masks else "", []
    if len(masks) > 1 and all(name in matcher.graph.constants for name in masks):
        mask = _constant_sum(matcher, node.outputs[0], masks)
    elif len(masks) > 1:
        if matcher.graph.opsets.get("", 0) < 8:  # nor does its Sum spread what it adds
            return None
        mask = matcher.new_value(node.outputs[0], "masks", _spread(matcher, masks))
        nodes = [new_node("Sum", masks, mask)]
    made = _attention(matcher, node, mixed, (q, k, v), scores, (mask, scale, zeros))
    return None if made is None else [*nodes, *made]


def _spread(matcher: Matcher, names: Sequence[str]) -> tuple[int, ...]:
    """The shape of the sum of values."""
    return np.broadcast_shapes(*[matcher.shape(name) or (0,) for name in names])


def _constant_sum(matcher: Matcher, like: str, names: Sequence[str]) -> str:
    """The name of a constant: the sum of others, made when it is wanted."""
    constants, made = matcher.graph.constants, f"{like}/headrace/masks"
    of = TensorType(onnx.TensorProto.FLOAT, _spread(matcher, names))
    constants.derive(
        made, of, names, lambda: np.add(*[constants.array(n) for n in names], dtype=np.float32)
    )
    return made


def _scores(matcher: Matcher, name: str) -> tuple[_Source, _Source, list[str], float] | None:
    """Queries, keys, what is added (masks, biases of places) and scale of scores."""
    masks: list[str] = []
    while len(masks) < MOST_MASKS:
        windows = _of_windows(matcher, name)
        if windows is not None:
            name = windows[0]
            masks.insert(0, windows[1])
            continue
        add = matcher.maker(name, "Add")
        if add is None:
            break
        direct = [i for i in (0, 1) if _product(matcher, add.inputs[i]) is not None]
        inner = direct or [i for i in (0, 1) if _is_scores(matcher, add.inputs[i])]
        if len(inner) != 1:
            return None
        name = add.inputs[inner[0]]
        masks.insert(0, add.inputs[1 - inner[0]])
    found = _product(matcher, name)
    if found is None:
        return None
    product, scale = found
    q, k = (_source(matcher, one) for one in product.inputs)
    return q, k, masks, scale * q.factor * k.factor


def _of_windows(matcher: Matcher, name: str) -> tuple[str, str] | None:
    """Scores and a constant mask of each window, where windows are apart from images for the sum.

    So does Swin mask what windows of rolled images have together (2103.14030).
    """
    behind = matcher.maker(name, "Reshape")
    add = None if behind is None else matcher.maker(behind.inputs[0], "Add")
    shape, constants = matcher.shape(name), matcher.graph.constants
    for inner, mask in () if add is None else (add.inputs, add.inputs[::-1]):
        apart, before = matcher.shape(inner) or (), matcher.maker(inner, "Reshape")
        held = constants.type(mask) if mask in constants else None
        if before is None or shape is None or matcher.shape(before.inputs[0]) != shape:
            continue
        if len(apart) != 5 or len(shape) != 4 or apart[2:] != shape[1:] or held is None:
            continue
        if held.elem_type != onnx.TensorProto.FLOAT or not held.shape:
            continue
        of = (1,) * (5 - len(held.shape)) + held.shape
        if len(of) > 5 or np.broadcast_shapes(of, apart) != apart:
            continue
        # What all windows have alike, or those of all images, stays so.
        first = (1, 1) if of[:2] == (1, 1) else apart[:2]
        return before.inputs[0], _mask_of_windows(matcher, mask, (*first, *of[2:]), name)
    return None


def _mask_of_windows(matcher: Matcher, mask: str, apart: tuple[int, ...], like: str) -> str:
    """The name of a constant: a mask for the windows of all images, in one dimension."""
    constants, sizes = matcher.graph.constants, (apart[0] * apart[1], *apart[2:])
    made = f"{like}/headrace/mask of windows"
    constants.derive(
        made, TensorType(onnx.TensorProto.FLOAT, sizes), [mask],
        lambda: np.broadcast_to(constants.array(mask), apart).reshape(sizes),
    )  # fmt: skip
    return made


def _is_scores(matcher: Matcher, name: str) -> bool:
    """Whether a value is a product to which something is added."""
    add = matcher.maker(name, "Add")
    return add is not None and any(_product(matcher, one) is not None for one in add.inputs)


def _product(matcher: Matcher, name: str) -> tuple[Node, float] | None:
    """The product that a value is, and what it was multiplied with since."""
    source = _source(matcher, name)
    product = matcher.maker(source.name, "MatMul")
    return None if product is None or source.moves else (product, source.factor)


def _source(matcher: Matcher, name: str, *, factors: bool = True) -> _Source:
    """Back through shuffles, and through factors if they are wanted."""
    moves: list[_Move] = []
    factor = 1.0
    while True:
        node = matcher.maker(name, *_MOVES, *_PARTS)
        is_move = node is not None and node.inputs[0] not in matcher.graph.constants
        if node is not None and is_move and len(moves) < MOST_MOVES:
            moves.append(_Move(node, name))
            name = node.inputs[0]
            continue
        node = matcher.maker(name, "Mul", "Div") if factors else None
        split = None if node is None else matcher.split(node)
        if node is None or split is None or (node.op == "Div" and split[0] != node.inputs[0]):
            return _Source(name, tuple(moves[::-1]), factor)
        factor = factor * split[1] if node.op == "Mul" else factor / split[1]
        name = split[0]


def _attention(
    matcher: Matcher, node: Node, mixed: _Source, parts: Sequence[_Source],
    scores: tuple[int, ...], more: tuple[str, float, bool],
) -> list[Node] | None:  # fmt: skip
    batch, heads, queries, keys = scores
    mask, scale, zeros = more
    given = matcher.shape(node.outputs[0]) or ()
    width = given[-1]
    shape = (batch, queries, width)
    if given not in (shape, (batch * queries, width)) or width % heads or not math.isfinite(scale):
        return None
    head = width // heads
    tokens = (queries, keys, keys)
    columns = []
    # Places of [batch, heads, tokens, channels] in rows [batch, tokens, heads x channels].
    parts = [
        _as_rows(matcher, part, (batch, count)) for part, count in zip(parts, tokens, strict=True)
    ]
    for part, count, turned in zip(parts, tokens, (False, True, False), strict=True):
        whole = matcher.shape(part.name) or ()
        if whole[:-1] != (batch, count) or whole[-1] % width:
            return None
        ends = _ends(matcher, part, whole)
        if ends is None or not ends.size:
            return None
        columns.append(int(ends.flat[0]))
        if not 0 <= columns[-1] <= whole[-1] - width:
            return None
        rows = _places(whole)[..., columns[-1] : columns[-1] + width]
        wanted = rows.reshape(batch, count, heads, head).transpose(0, 2, 1, 3)
        if turned:
            wanted = wanted.swapaxes(2, 3)
        if ends.shape != wanted.shape or not (ends == wanted).all():
            return None
    inside = (batch, heads, queries, head)
    wanted = _places(inside).transpose(0, 2, 1, 3).reshape(shape)
    ends = _ends(matcher, mixed, inside)
    if ends is None or ends.size != wanted.size or not (ends.reshape(shape) == wanted).all():
        return None
    made = node.outputs[0] if given == shape else matcher.new_value(node.outputs[0], "rows", shape)
    names, projected = [part.name for part in parts], None
    if len(set(names)) == 3 and not any(columns):
        projected = _projected(matcher, parts, node.outputs[0])
    if projected is not None:
        names, columns = projected.outputs * 3, [0, width, 2 * width]
    attention = new_node(
        "Attention", [*names, mask], made, "headrace",
        heads=heads, scale=scale, zeros=int(zeros), columns=columns,
    )  # fmt: skip
    nodes = [attention] if projected is None else [projected, attention]
    if made != node.outputs[0]:  # products may take all tokens as one matrix
        sizes = matcher.new_constant(np.array(given))
        nodes.append(new_node("Reshape", [made, sizes], node.outputs[0]))
    return nodes


def _as_rows(matcher: Matcher, part: _Source, sizes: tuple[int, int]) -> _Source:
    """A source from where the tokens of a batch are apart: products may take all as one matrix."""
    name, moves = part.name, part.moves
    while moves and (matcher.shape(name) or ())[:-1] == (math.prod(sizes),):
        name, moves = moves[0].makes, moves[1:]
    return _Source(name, moves, part.factor)


def _projected(matcher: Matcher, parts: Sequence[_Source], like: str) -> Node | None:
    """One product for queries, keys and values; None: they are not of the same value."""
    makers = [matcher.makers.get(part.name) for part in parts]
    nodes = [one for one in makers if one is not None and one.domain == "headrace"]
    if len(nodes) != 3 or len({(one.op, one.inputs[0]) for one in nodes}) > 1:
        return None
    shape = matcher.shape(parts[0].name) or ()
    made = matcher.new_value(like, "projections", (*shape[:-1], 3 * shape[-1]))
    if nodes[0].op == "Linear":
        roles = {1: "weights", 2: "bias"}
    elif nodes[0].op == dynamic.OP and all(_by_channels(matcher, one, shape[-1]) for one in nodes):
        roles = {1: "weights", 2: "scales", 4: "bias"}
    else:
        return None
    inputs = list(nodes[0].inputs)
    for i, role in roles.items():
        inputs[i] = matcher.joined(like, role, [one.inputs[i] for one in nodes])
    return new_node(nodes[0].op, inputs, made, "headrace")


def _by_channels(matcher: Matcher, node: Node, channels: int) -> bool:
    """Whether a DynamicLinear has a scale and a bias for each channel, and no zero points."""
    names = [named(node.inputs, i) for i in (2, 3, 4)]
    return not names[1] and all(matcher.shape(one) == (channels,) for one in names[::2])


def _places(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def _ends(matcher: Matcher, source: _Source, shape: tuple[int, ...]) -> np.ndarray | None:
    """Where the moves of a source bring its elements; None: that is not known."""
    if math.prod(shape) > MOST_ELEMENTS:
        return None
    at: np.ndarray | None = _places(shape)
    for move in source.moves:
        if at is None:
            return None
        after = matcher.shape(move.makes)
        if move.node.op == "Transpose":
            at = at.transpose(move.node.attribute("perm", list(range(at.ndim))[::-1]))
        elif move.node.op in _PARTS:
            at = _part(matcher, move, at)
        elif after is not None and math.prod(after) == at.size:
            at = at.reshape(after)
        else:
            return None
    return at


def _part(matcher: Matcher, move: _Move, at: np.ndarray) -> np.ndarray | None:
    """What Split, Slice or Gather gives of these elements."""
    node, shape = move.node, matcher.shape(move.node.inputs[0])
    if shape != at.shape:
        return None
    if node.op == "Slice":
        places = places_of_slice(matcher.graph, node)
        for axis, numbers in (places or {}).items():
            at = at.take(numbers, axis)
        return None if places is None else at
    axis = node.attribute("axis", 0) % at.ndim
    if node.op == "Gather":
        name, constants = node.inputs[1], matcher.graph.constants
        if name not in constants or not constants.is_small(name):
            return None
        ids = constants.array(name)
        inside = ((ids >= -at.shape[axis]) & (ids < at.shape[axis])).all()
        return at.take(ids, axis) if inside else None
    begin = 0
    for name in node.outputs:
        size = (matcher.shape(name) or ())[axis : axis + 1]
        if not size:
            return None
        if name == move.makes:
            return at.take(range(begin, begin + size[0]), axis)
        begin += size[0]
    return None


# For the table in docs/onnx.md: which of them.
WHICH = {
    "attention, GELU, LayerNorm, SiLU": (
        "as exporters spell them ([encoders](#encoders)); queries, keys and values may be "
        "parts of one value; also of windows, each with its mask (Swin); masks out of ones and "
        "zeros of tokens"
    ),
}
