"""A run of operators on kernels of ours, as one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype

from headrace.errors import CancelledError, HeadraceError
from headrace.kernels.execute import STEP_BARRIER, STEP_SLOTS
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.networks.engine import Engine
from headrace.networks.graph import Graph, Node
from headrace.networks.lifetimes import Life, placed
from headrace.networks.operation import Image, Operation, Weight, bytes_of, image_of
from headrace.networks.passes.at_borders import passing
from headrace.networks.passes.borders import with_borders
from headrace.networks.passes.in_place import in_place
from headrace.networks.passes.into_convolutions import into_convolutions
from headrace.networks.passes.planes import write_planes
from headrace.networks.quantisation import added, elem_type

_GIVEN = 1 << 62  # stands for addresses that are known only when it runs; 1 << 44 for each value
BEHIND = 64  # bytes that kernels may read behind a value


class NativeRegion:
    """Nodes that all have kernels of ours.

    Args:
        graph: that has the nodes.
        nodes: in order.
        operations: of each of them; they are the region's from now on.
        outputs: values that somebody else wants.
        engine: threads and kernels.

    Attributes:
        inputs, outputs: names.
        operations: that are left of the nodes.
        arena_bytes, weight_bytes: that it takes; weights may be shared with other regions.

    Raises:
        KernelError: a kernel does not compile, or there is no compiler.
        BudgetError: the system gives no memory.
    """

    by_reference = None

    def __init__(
        self, graph: Graph, nodes: Sequence[Node], operations: Sequence[Operation],
        outputs: Sequence[str], engine: Engine,
    ) -> None:  # fmt: skip
        self.nodes = list(nodes)
        self.outputs = list(outputs)
        operations = [one for first in operations for one in (first, *first.also)]
        made = {one.makes for one in operations}
        wanted = [n for one in operations for n in (*one.inputs, *one.plain)]
        self.inputs = list(dict.fromkeys(n for n in wanted if n not in made))
        operations = into_convolutions(operations, set(outputs))
        self._engine = engine
        self._types = {name: elem_type(graph, name) for name in (*self.inputs, *self.outputs)}
        self._passing = passing(operations, self.inputs, self.outputs)
        self._shapes = {name: graph.shape(name) or () for name in self.outputs}
        self._images = {name: self._image(graph, name) for name in self._values(operations)}
        planes = [name for name in self.inputs if len(graph.shape(name) or ()) == 4]
        operations = with_borders(operations, self._images, planes)
        for name in {n for one in operations for n in one.plain}:
            self._images.pop(name, None)
        write_planes(operations, self._images, self.outputs)
        self._images |= {one.makes: one.image for one in operations if one.image is not None}
        fixed = {*self.inputs, *self.outputs}
        self.operations, self._places = in_place(operations, self._images, fixed)
        ends = dict.fromkeys((*self.inputs, *self.outputs))
        self._outside = {name: _GIVEN + (i << 44) for i, name in enumerate(ends)}
        # What lies as ONNX has it is read and written where the caller has it.
        self._given = {
            name: at
            for name, at in self._outside.items()
            if name not in self._images or self._images[name].as_in_onnx
        }
        offsets, self.arena_bytes = placed(self._lives())
        self.arena_bytes += BEHIND
        self._arena = Arena({"values": self.arena_bytes})
        self._at = {name: self._arena.base + at for name, at in offsets.items()} | self._given
        self._at |= {name: self._at[at.root] + at.n_bytes for name, at in self._places.items()}
        self._weights: list[Any] = []  # they go with the last region that has them
        self.weight_bytes = 0
        self._steps, self._blocks, self._patches = self._compiled()

    @staticmethod
    def _image(graph: Graph, name: str) -> Image:
        found = image_of(graph, name) or bytes_of(graph, name)
        assert found is not None, name
        return found

    def _values(self, operations: Sequence[Operation]) -> list[str]:
        """All that lie as images, and that the graph knows."""
        read = {name for one in operations for name in one.inputs}
        inputs = [name for name in self.inputs if name in read]
        own = {one.makes for one in operations if one.image is not None}
        names = dict.fromkeys([*inputs, *(one.makes for one in operations)])
        return [name for name in names if name not in own and name not in self._passing]

    def _lives(self) -> dict[str, Life]:
        last: dict[str, int] = {}
        first = dict.fromkeys((name for name in self.inputs if name in self._images), -1)
        for i, one in enumerate(self.operations):
            for name in one.inputs:
                last[self._root(name)] = i
            root = self._root(one.makes)
            first.setdefault(root, i)
            last[root] = i
        last.update({self._root(name): len(self.operations) for name in self.outputs})
        lives = {
            name: Life(self._images[name].n_bytes, begin, last.get(name, begin))
            for name, begin in first.items()
            if name not in self._given
        }
        return lives | {
            _scratch(i): Life(one.scratch * self._engine.threads, i, i)
            for i, one in enumerate(self.operations)
            if one.scratch
        }

    def _root(self, name: str) -> str:
        return self._places[name].root if name in self._places else name

    def _compiled(self) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str, int]]]:
        """Steps, argument blocks, and where in these which address comes with what added to it."""
        calls: list[tuple[str, list[Any]]] = []
        for name in self.inputs:
            if name not in self._given:
                calls.append(self._moved("gather", name, self._outside[name], self._at[name]))
        passes = list(self._passing.values())
        for i, operation in enumerate(self.operations):
            if operation.affine is not None:
                operation.weights |= dict(zip(("scales", "shifts"), operation.affine, strict=True))
            own = {name: self._placed_weight(weight) for name, weight in operation.weights.items()}
            operation.weights = {}  # they have their place
            if operation.scratch:
                own["scratch"] = self._at[_scratch(i)]
            kernel, slots = operation.kernel, operation.slots
            if operation.at_border is not None and any(one is operation for one in passes):
                kernel, slots = operation.at_border
            calls.append((kernel, slots(operation, self._at | own)))
        for name in self.outputs:
            if name not in self._given:
                calls.append(self._moved("scatter", name, self._at[name], self._outside[name]))
        addresses = self._engine.addresses({kernel for kernel, _ in calls})
        starts = np.cumsum([0, *(len(slots) for _, slots in calls)])
        blocks = np.concatenate([argument_block(slots) for _, slots in calls])
        steps = np.zeros((len(calls), STEP_SLOTS), np.int64)
        steps[:, 0] = [addresses[kernel] for kernel, _ in calls]
        steps[:, 1] = blocks.ctypes.data + 8 * starts[:-1]
        steps[:, 2] = STEP_BARRIER
        ends = list(self._outside)
        patches = [
            (int(at), ends[int(blocks[at] - _GIVEN) >> 44], int(blocks[at]) & ((1 << 44) - 1))
            for at in np.flatnonzero(blocks >= _GIVEN)
        ]
        return steps, blocks, patches

    def _moved(self, how: str, name: str, source: int, to: int) -> tuple[str, list[Any]]:
        one = self._images[name]
        slots = [source, to, one.images, one.channels, one.pixels]
        if one.item == 4:
            return f"images_{how}", [*slots, one.padded]
        return f"images_{how}_u8", [*slots, one.pixel_bytes, added(self._types[name])]

    def _placed_weight(self, weight: np.ndarray | Weight) -> int:
        """Its address, in memory that this region keeps."""
        placed = self._engine.weights.placed(weight)
        self._weights.append(placed)
        self.weight_bytes += placed.n_bytes
        return placed.base

    def types(self) -> dict[str, Any]:
        """Of outputs: all are known before."""
        return {}

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs for inputs.

        Raises:
            HeadraceError: an index is out of bounds.
            CancelledError: somebody cancelled it.
        """
        held = {name: np.ascontiguousarray(values[name]) for name in self.inputs}
        found = {
            name: np.empty(self._shapes[name], tensor_dtype_to_np_dtype(self._types[name]))
            for name in self.outputs
        }
        self._check(held)
        for at, name, more in self._patches:
            self._blocks[at] = (found if name in found else held)[name].ctypes.data + more
        if not self._engine.team.run(self._steps):
            raise CancelledError("the network was cancelled")
        return found

    def _check(self, held: Mapping[str, np.ndarray]) -> None:
        for one in self.operations:
            for name, (least, most) in one.bounds.items():
                array = held[name]
                if array.min() < least or array.max() > most:
                    wrong = array.min() if array.min() < least else array.max()
                    raise HeadraceError(
                        f"{one.nodes[0].label}: {name} has an element {wrong}, and the table has "
                        f"entries from {least} to {most}"
                    )


def _scratch(index: int) -> str:
    return f"scratch of operation {index}"
