"""GroupNormalization and ConvNeXt V2's response norm as PyTorch's exporters spell them.

The first is InstanceNormalization of groups [images, groups, all else], between reshapes; the other
(2301.00808) x + weight x n + bias, where n is length / (mean of lengths + epsilon).
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from headrace.networks.graph import Node, TensorType
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.quantisation import named

OPS = ("GroupNormalization", "ResponseNorm")  # that are made here
MOST_STEPS = 8  # behind a norm: exporters write two


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """The norm in place of the last reshape, product or sum."""
    if node.domain or node.op not in ("Reshape", "Mul", "Add"):
        return None
    y = node.outputs[0]
    shape = matcher.shape(y)
    if shape is None or len(shape) not in (3, 4) or not math.prod(shape):
        return None
    return _group_norm(matcher, y, shape) or _response_norm(matcher, node, shape)


class _Affine:
    """What is left of a value by taking factors and summands of channels away.

    Attributes:
        name: of that value.
        scale, shift: make the first one of it again; of float64, [channels].
    """

    def __init__(self, matcher: Matcher, name: str, shape: tuple[int, ...], axis: int) -> None:
        self.name, self._shape, self._axis, self._matcher = name, shape, axis, matcher
        self.scale, self.shift = np.ones(shape[axis]), np.zeros(shape[axis])
        for _ in range(MOST_STEPS):
            node = matcher.maker(self.name, "Mul", "Add")
            if node is None:
                return
            inner, given = node.inputs
            values = self._of_channels(given)
            if values is None:
                inner, values = given, self._of_channels(inner)
            if values is None or matcher.shape(inner) != shape or self._is_shared(inner):
                return
            if node.op == "Add":
                self.shift = self.shift + self.scale * values
            else:
                self.scale = self.scale * values
            self.name = inner

    def _is_shared(self, name: str) -> bool:
        """Whether others want a value as well, which would be computed twice."""
        graph = self._matcher.graph
        return len(self._matcher.users.get(name, ())) > 1 or name in graph.outputs

    def _of_channels(self, name: str) -> np.ndarray | None:
        constants, rank = self._matcher.graph.constants, len(self._shape)
        if name not in constants:
            return None
        of = constants.type(name)
        whole = (1,) * (rank - len(of.shape or ())) + (of.shape or ())
        if of.elem_type != onnx.TensorProto.FLOAT or len(whole) != rank:
            return None
        channels = self._shape[self._axis]
        if math.prod(whole) != whole[self._axis] or whole[self._axis] not in (1, channels):
            return None
        return np.broadcast_to(constants.array(name).reshape(-1).astype(np.float64), channels)


def _put(matcher: Matcher, like: str, role: str, values: np.ndarray) -> str:
    """The name of a constant that the file does not have."""
    name, held = f"{like}/headrace/{role}", values.astype(np.float32)
    of = TensorType(onnx.TensorProto.FLOAT, held.shape)
    matcher.graph.constants.derive(name, of, (), lambda: held)
    return name


def _group_norm(matcher: Matcher, y: str, shape: tuple[int, ...]) -> list[Node] | None:
    affine = _Affine(matcher, y, shape, 1)
    behind = matcher.maker(affine.name, "Reshape")
    norm = None if behind is None else matcher.maker(behind.inputs[0], "InstanceNormalization")
    before = None if norm is None else matcher.maker(norm.inputs[0], "Reshape")
    if norm is None or before is None or matcher.shape(before.inputs[0]) != shape:
        return None
    apart, constants = matcher.shape(norm.inputs[0]) or (), matcher.graph.constants
    if len(apart) < 3 or apart[0] != shape[0] or shape[1] % apart[1]:
        return None
    if any(name not in constants for name in norm.inputs[1:3]):
        return None
    weight, bias = (
        constants.array(name).astype(np.float64).repeat(shape[1] // apart[1])
        for name in norm.inputs[1:3]
    )
    if not weight.size == bias.size == shape[1]:
        return None
    names = [
        _put(matcher, y, "weight", weight * affine.scale),
        _put(matcher, y, "bias", bias * affine.scale + affine.shift),
    ]
    epsilon = norm.attribute("epsilon", 1e-5)
    x = before.inputs[0]
    return [new_node("GroupNormalization", [x, *names], y, num_groups=apart[1], epsilon=epsilon)]


def _response_norm(matcher: Matcher, node: Node, shape: tuple[int, ...]) -> list[Node] | None:
    if node.op != "Add" or len(shape) != 4:
        return None
    y = node.outputs[0]
    for x, other in (node.inputs, node.inputs[::-1]):
        for axis in (1, 3):
            affine = _Affine(matcher, other, shape, axis)
            product = matcher.maker(affine.name, "Mul")
            if product is None or x not in product.inputs or product.inputs[0] == product.inputs[1]:
                continue
            (share,) = (name for name in product.inputs if name != x)
            epsilon = _share_of(matcher, share, x, axis)
            if epsilon is None:
                continue
            names = [
                _put(matcher, y, "weight", affine.scale), _put(matcher, y, "bias", affine.shift)
            ]  # fmt: skip
            return [new_node("ResponseNorm", [x, *names], y, "headrace", epsilon=epsilon)]
    return None


def _share_of(matcher: Matcher, name: str, x: str, axis: int) -> float | None:
    """epsilon, where a value is what lengths of channels of x are of their mean and epsilon."""
    quotient = matcher.maker(name, "Div")
    total = None if quotient is None else matcher.maker(quotient.inputs[1], "Add")
    split = None if total is None else matcher.split(total)
    mean = None if split is None else matcher.maker(split[0], "ReduceMean")
    if quotient is None or split is None or mean is None or mean.inputs[0] != quotient.inputs[0]:
        return None
    length = matcher.maker(quotient.inputs[0], "ReduceL2")
    if length is None or length.inputs[0] != x:
        return None
    pixels = [i for i in (1, 2, 3) if i != axis]
    if _axes(matcher, length) != pixels or _axes(matcher, mean) != [axis]:
        return None
    return split[1]


def _axes(matcher: Matcher, node: Node) -> list[int] | None:
    """Those of four that it takes together, if they stay with one element."""
    if not node.attribute("keepdims", 1):
        return None
    name, axes = named(node.inputs, 1), node.attribute("axes")
    if name:
        constants = matcher.graph.constants
        axes = constants.array(name).tolist() if name in constants else None
    return None if axes is None else sorted(axis % 4 for axis in axes)
