"""Masks of attention: numbers that are added to scores, out of ones and zeros of tokens.

As exporters write them: `(1 - mask) * -10000`, or a choice of two numbers, and what spreads it over
heads and queries. The host would compute it for longer than a layer takes of a short text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx

from headrace.kernels.mask import BEFORE, BEFORE_ONES, BEFORE_SUM, CHOICE, PRODUCT
from headrace.networks.graph import Node
from headrace.networks.operators.mask import READ
from headrace.networks.patterns.match import Matcher, new_node

_MOVES = ("Reshape", "Unsqueeze", "Squeeze", "Identity")
_FLOAT, _INT32, _INT64 = (
    onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64,
)  # fmt: skip


class _Integers(NamedTuple):
    """Integers as they come in, and how many bytes of each count."""

    name: str
    read: int


class _Moved(NamedTuple):
    """A value sign * x + shift."""

    x: _Integers
    sign: float = 1.0
    shift: float = 0.0


class _Made(NamedTuple):
    """A mask: what it is of which integers (`headrace.kernels.mask`)."""

    form: int
    of: _Moved
    first: float
    second: float = 0.0


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.Mask and the attention that adds its rows."""
    if node.domain != "headrace" or node.op != "Attention" or len(node.inputs) < 4:
        return None
    name, shape = node.inputs[3], matcher.shape(node.inputs[1])
    if node.attribute("mask_rows", 0) or not name or shape is None:
        return None
    sizes = (shape[0], shape[1])
    of = _Chain(matcher, sizes).made(name)
    if of is None:
        return None
    made = matcher.new_value(node.outputs[0], "mask", sizes)
    (x, read), sign, shift = of.of
    mask = new_node(
        "Mask", [x], made, "headrace",
        read=read, form=of.form, sign=sign, shift=shift, first=of.first, second=of.second,
    )  # fmt: skip
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[3] = made
    proto.attribute.append(onnx.helper.make_attribute("mask_rows", 1))
    return [mask, Node(proto, ours_alone=True)]


class _Chain:
    """What makes a mask, from its end back to integers of [batch, keys]."""

    def __init__(self, matcher: Matcher, sizes: tuple[int, int]) -> None:
        self._matcher, self._sizes = matcher, sizes

    def made(self, mask: str) -> _Made | None:
        """None: it is made in another way."""
        shape = self._matcher.shape(mask) or ()
        if math.prod(shape) <= math.prod(self._sizes) and not self._is_spread(mask, self._sizes):
            return None
        name = self._before(mask)
        node = None if name is None else self._matcher.maker(name, "Mul", "Where")
        if node is None:
            return None
        if node.op == "Where":
            return self._choice(node)
        split = self._matcher.split(node)
        moved = None if split is None else self._moved(split[0])
        return None if moved is None or split is None else _Made(PRODUCT, moved, split[1])

    def _before(self, name: str) -> str | None:
        """Back through what leaves elements as they are; None: they are spread otherwise."""
        while True:
            node = self._matcher.maker(name, *_MOVES, "Expand")
            shape = self._matcher.shape(name)
            if shape is None:
                return None
            if node is None:
                return name
            if node.op != "Expand" and math.prod(shape) > math.prod(self._sizes):
                return None  # what was spread is turned
            name = node.inputs[0]
            if node.op == "Expand" and not self._is_spread(name, self._sizes):
                return None

    def _is_spread(self, name: str, sizes: tuple[int, int]) -> bool:
        """Whether a value goes for all heads and queries."""
        shape = self._matcher.shape(name) or ()
        return len(shape) <= 4 and ((1,) * 4 + shape)[-4:] == (sizes[0], 1, 1, sizes[1])

    def _maker(self, name: str | None, op: str) -> Node | None:
        before = None if name is None else self._before(name)
        return None if before is None else self._matcher.maker(before, op)

    def _moved(self, name: str) -> _Moved | None:
        """What a float32 value is of integers."""
        subtraction, sign, shift = self._maker(name, "Sub"), 1.0, 0.0
        if subtraction is not None:
            split = self._matcher.split(subtraction)
            if split is None or subtraction.inputs[1] != split[0]:
                return None
            name, sign, shift = split[0], -1.0, split[1]
        cast = self._maker(name, "Cast")
        if cast is None or cast.attribute("to") != _FLOAT:
            return None
        x = self._integers(cast.inputs[0], self._sizes)
        return None if x is None else _Moved(x, sign, shift)

    def _choice(self, node: Node) -> _Made | None:
        """Of Where: by what is or is not 0, or by places before a number."""
        condition, *ends = node.inputs
        first, second = (self._matcher.scalar(name) for name in ends)
        if first is None:
            return None
        less = self._maker(condition, "Less")
        if less is not None:
            counts = self._counts(less)
            if counts is None or second is None:
                return None
            return counts._replace(first=first, second=second)
        cast = self._maker(condition, "Cast")
        asked = condition if cast is None else cast.inputs[0]
        moved = self._moved(asked)
        if moved is not None and second is None and self._before(ends[1]) == self._before(asked):
            second = 0.0
        if moved is None:
            x = self._integers(asked, self._sizes)
            moved = None if x is None else _Moved(x)
        return None if moved is None or second is None else _Made(CHOICE, moved, first, second)

    def _counts(self, less: Node) -> _Made | None:
        """Of places that come before a number of [batch], a sum of integers, or how many are 1."""
        places, counts = less.inputs
        constants, (batch, keys) = self._matcher.graph.constants, self._sizes
        if places not in constants or not constants.is_small(places):
            return None
        given = constants.array(places)
        if given.shape[-1:] != (keys,) or not (given.reshape(-1) == np.arange(keys)).all():
            return None
        if not self._is_spread(counts, (batch, 1)):
            return None
        total = self._maker(counts, "ReduceSum")
        if total is None:
            x = self._integers(counts, (batch, 1))
            return x and _Made(BEFORE, _Moved(x), 0.0)
        axes = total.attribute("axes", None)
        if len(total.inputs) > 1 and total.inputs[1] in constants:
            axes = constants.array(total.inputs[1]).tolist()
        if self._matcher.shape(total.inputs[0]) != self._sizes or axes not in ([1], [-1]):
            return None
        ones = self._ones(total.inputs[0])
        if ones is not None:
            return _Made(BEFORE_ONES, _Moved(ones), 0.0)
        x = self._integers(total.inputs[0], self._sizes)
        return None if x is None or x.read != 4 else _Made(BEFORE_SUM, _Moved(x), 0.0)

    def _ones(self, name: str) -> _Integers | None:
        """Integers of which a value says whether they are 1, as an integer again."""
        cast = self._maker(name, "Cast")
        equal = None if cast is None else self._maker(cast.inputs[0], "Equal")
        split = None if equal is None else self._matcher.split(equal)
        if split is None or split[1] != 1:
            return None
        return self._integers(split[0], self._sizes)

    def _integers(self, name: str, sizes: tuple[int, int]) -> _Integers | None:
        """What a value of integers comes from."""
        before, read = self._before(name), 0
        cast = self._maker(name, "Cast")
        if cast is not None and cast.attribute("to") == _INT32:
            before, read = self._before(cast.inputs[0]), 4
        of = None if before is None else self._matcher.graph.type(before)
        if before is None or of is None or of.elem_type not in READ or of.shape is None:
            return None
        if math.prod(of.shape) != math.prod(sizes) or (read and of.elem_type != _INT64):
            return None
        return _Integers(before, read or READ[of.elem_type])
