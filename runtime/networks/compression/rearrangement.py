"""Channels of a whole network in another order, so that what is pruned together is alike.

Weights of one input and some neighbouring outputs go or stay together (`pruning.PATTERNS`), so less
is lost where neighbours have their large weights in the same places (SparseByteNN's rearrangement
of the whole network; the search is that of Pool and Yu, "Channel Permutations for N:M Sparsity",
2021). A channel has one place in all that hands it on: depthwise convolutions and activations
follow, and sums put all of their inputs into one order. What the network reads and gives stays
where it is. The dense network gives what it gave, but for the order in which products are summed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from headrace.networks.compression.names import reads
from headrace.networks.compression.sparse_layers import SparseLayer
from headrace.sparse.format import Floats

SWEEPS = 3
# Operators that give each channel of their first input on, whatever the others are.
_ALONE = {
    "Clip", "Relu", "LeakyRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Identity",
    "GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool",
}  # fmt: skip
_TOGETHER = {"Add", "Sub", "Mul", "Max", "Min"}  # of values of the same channels
_FLAT = {"Flatten", "Reshape", "Squeeze"}  # of images of one pixel


def rearrange(
    model: Any, layers: Sequence[SparseLayer], scores: Sequence[Floats], rows: int, sparsity: float,
    notice: Callable[[str], None] = lambda text: None,
) -> int:  # fmt: skip
    """Bring channels into an order in which groups of `rows` lose little, in place.

    Args:
        model: ModelProto with its weights inside and with shapes.
        layers: of it, that are to be pruned.
        scores: what each of their weights is worth, [outputs, channels read].
        rows: outputs that go together.
        sparsity: share of their weights that goes.
        notice: is told what happens.

    Returns:
        how many sets of channels have another order.
    """
    makers = dict(zip((one.node.output[0] for one in layers), scores, strict=True))
    found = 0
    for values, places in _channels(model):
        made = [makers[name] for name in values if name in makers]
        if not made:
            continue
        notice(f"order of the channels of {values[0]}")
        order = grouped(made, rows, sparsity)
        for tensor, axis in places:
            array = numpy_helper.to_array(tensor)
            moved = np.ascontiguousarray(np.take(array, order, axis))
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
        found += 1
    return found


def grouped(scores: Sequence[Floats], rows: int, sparsity: float) -> np.ndarray:
    """An order of channels, of which each `rows` have their large scores in the same places.

    Channels of similar sums come first together, then pairs change their places as long as that
    adds to what stays: the sums of blocks, as far as they are above what such a share leaves out.

    Args:
        scores: of several matrices [channels, channels read], which are pruned each by itself.
    """
    parts = [one / max(float(one.mean()), 1e-30) for one in scores]
    all_scores = np.concatenate(parts, axis=1).astype(np.float32)
    count = len(all_scores)
    order = np.argsort(-all_scores.sum(axis=1), kind="stable")
    padded = np.zeros((-(-count // rows) * rows, all_scores.shape[1]), np.float32)
    padded[:count] = all_scores[order]
    place = np.arange(len(padded))  # what is where: rows of `padded`
    for _ in range(SWEEPS):
        if not _sweep(padded, place, count, rows, [one.shape[1] for one in parts], sparsity):
            break
    found: np.ndarray = order[place[:count]]
    return found


def _sweep(
    scores: Floats, place: np.ndarray, count: int, rows: int, widths: Sequence[int], sparsity: float
) -> bool:  # fmt: skip
    """Let each row change places with the one that is best for both groups; says if any did.

    Args:
        scores: of all rows; of the last ones, behind `count`, there is nothing.
        place: which row is where, in place; those last ones stay.
    """
    blocks = scores[place].reshape(-1, rows, scores.shape[1]).sum(axis=1)
    of_each = np.split(blocks, np.cumsum(widths)[:-1], axis=1)
    least = np.concatenate([
        np.full(part.shape[1], np.quantile(part, sparsity), np.float32) for part in of_each
    ])  # fmt: skip
    kept = np.maximum(blocks - least, 0).sum(axis=1)
    group = np.arange(len(place)) // rows
    changed = False
    for at in range(count):
        mine = group[at]
        row = scores[place[at]]
        without = blocks[mine] - row - least
        here = np.maximum(without + scores[place], 0).sum(axis=1)
        there = np.maximum(blocks[group] - scores[place] + (row - least), 0).sum(axis=1)
        gain = here + there - kept[group] - kept[mine]
        gain[group == mine] = gain[count:] = 0
        other = int(gain.argmax())
        if gain[other] <= 1e-4 * (kept[mine] + kept[group[other]]):
            continue
        place[[at, other]] = place[[other, at]]
        for one in (mine, group[other]):
            blocks[one] = scores[place[one * rows : one * rows + rows]].sum(axis=0)
            kept[one] = np.maximum(blocks[one] - least, 0).sum()
        changed = True
    return changed


def _channels(model: Any) -> list[tuple[list[str], list[tuple[Any, int]]]]:
    """Sets of channels that may have another order: values that have them, and weights.

    Of weights, the tensors and the axes that are these channels.
    """
    inner = (one.type for node in model.graph.node for one in node.attribute)
    if any(kind in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for kind in inner):
        return []  # whose nodes may read anything
    graph = _Graph(model)
    for node in model.graph.node:
        if not graph.follows(node):
            for name in (*node.input, *node.output):
                graph.stays(name)
    for one in (*model.graph.input, *model.graph.output):
        graph.stays(one.name)
    return graph.free()


class _Graph:
    """Values whose channels have one order, as far as nodes have been looked at."""

    def __init__(self, model: Any) -> None:
        self._constants = {one.name: one for one in model.graph.initializer}
        self._used = reads(model)
        self._shapes = {
            one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim]
            for one in (*model.graph.value_info, *model.graph.input, *model.graph.output)
            if one.type.tensor_type.HasField("shape")
        }
        self._over: dict[str, str] = {}
        self._fixed: set[str] = set()
        self._places: list[tuple[str, Any, int]] = []

    def _root(self, name: str) -> str:
        while name in self._over:
            name = self._over[name]
        return name

    def _join(self, names: Sequence[str]) -> None:
        for name in names[1:]:
            one, other = self._root(names[0]), self._root(name)
            if one != other:
                self._over[other] = one

    def stays(self, name: str) -> None:
        """A value keeps the order of its channels."""
        if name and name not in self._constants:
            self._fixed.add(name)

    def free(self) -> list[tuple[list[str], list[tuple[Any, int]]]]:
        """Sets that nobody has fixed."""
        fixed = {self._root(name) for name in self._fixed}
        values = defaultdict(list)
        for name in self._shapes:
            values[self._root(name)].append(name)
        places = defaultdict(list)
        for name, tensor, axis in self._places:
            places[self._root(name)].append((tensor, axis))
        return [(values[root], found) for root, found in places.items() if root not in fixed]

    def follows(self, node: Any) -> bool:
        """Whether it is known how channels go through a node; if so it is noted."""
        if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return False
        x, y = node.input[0] if node.input else "", node.output[0]
        if x in self._constants or x not in self._shapes or y not in self._shapes:
            return False
        if node.op_type == "Conv":
            return self._convolves(node)
        if node.op_type == "Gemm":
            return self._multiplies(node)
        given = [name for name in node.input if name and name not in self._constants]
        images = all(len(self._shapes.get(name, ())) == 4 for name in (*given, y))
        if node.op_type in _ALONE and given == [x] and images:
            self._join([x, y])
            return True
        if node.op_type in _TOGETHER and len(node.input) == 2:
            sizes = {self._shapes[name][1] for name in (*given, y)} if images else set()
            single = all(
                int(np.prod(self._constants[name].dims)) == 1
                for name in node.input
                if name in self._constants
            )
            if single and len(sizes) == 1 and 0 not in sizes:
                self._join([*given, y])
                return True
        if node.op_type in _FLAT and given == [x]:
            read, made = self._shapes[x], self._shapes[y]
            if len(read) == 4 and read[2:] == [1, 1] and len(made) == 2 and read[1] == made[1]:
                self._join([x, y])
                return True
        return False

    def _weight(self, name: str) -> Any:
        tensor = self._constants.get(name)
        if tensor is None or self._used[name] != 1 or tensor.data_type != TensorProto.FLOAT:
            return None
        return tensor

    def _convolves(self, node: Any) -> bool:
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        weight, groups = self._weight(node.input[1]), given.get("group", 1)
        biases = [self._weight(name) for name in node.input[2:] if name]
        if weight is None or None in biases:
            return False
        x, y = node.input[0], node.output[0]
        if groups != 1:
            if weight.dims[1] != 1 or weight.dims[0] != groups:
                return False
            self._join([x, y])
        else:
            self._places.append((x, weight, 1))
        self._places.append((y, weight, 0))
        self._places += [(y, bias, 0) for bias in biases]
        return True

    def _multiplies(self, node: Any) -> bool:
        """Its inputs may have any order; its outputs are left as they are."""
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        weight = self._weight(node.input[1])
        if weight is None or given.get("transA", 0):
            return False
        self._places.append((node.input[0], weight, 1 if given.get("transB", 0) else 0))
        self.stays(node.output[0])
        return True
