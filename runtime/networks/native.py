"""A run of operators on kernels of ours, as one native call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype

from headrace.errors import CancelledError
from headrace.kernels.execute import STEP_BARRIER, STEP_SLOTS
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.networks.engine import Engine
from headrace.networks.graph import Graph, Node
from headrace.networks.lifetimes import Life, placed
from headrace.networks.operation import Image, bytes_of, image_of
from headrace.networks.operators import operation_for
from headrace.networks.passes.at_borders import passing
from headrace.networks.passes.into_convolutions import into_convolutions
from headrace.networks.quantisation import added, elem_type

_FROM, _TO = 0, 1  # slots of what brings inputs in and outputs out


class NativeRegion:
    """Nodes that all have kernels of ours.

    Args:
        graph: that has the nodes.
        nodes: in order.
        outputs: values that somebody else wants.
        engine: threads and kernels.

    Attributes:
        inputs, outputs: names.
        operations: that are left of the nodes.
        arena_bytes, weight_bytes: that it takes.

    Raises:
        KernelError: a kernel does not compile, or there is no compiler.
        BudgetError: the system gives no memory.
    """

    by_reference = None

    def __init__(
        self, graph: Graph, nodes: Sequence[Node], outputs: Sequence[str], engine: Engine
    ) -> None:
        self.nodes = list(nodes)
        self.outputs = list(outputs)
        made = {name for node in nodes for name in node.outputs}
        found = [operation_for(graph, node) for node in nodes]
        operations = [one for one in found if one is not None]
        self.inputs = list(
            dict.fromkeys(n for one in operations for n in one.inputs if n not in made)
        )
        self.operations = into_convolutions(operations, set(outputs))
        self._engine = engine
        self._types = {name: elem_type(graph, name) for name in (*self.inputs, *self.outputs)}
        self._passing = passing(self.operations, self.inputs, self.outputs)
        self._shapes = {name: graph.shape(name) or () for name in (*self.inputs, *self.outputs)}
        self._images = {name: self._image(graph, name) for name in self._values()}
        offsets, self.arena_bytes = placed(self._lives())
        self._arena = Arena({"values": self.arena_bytes})
        self._at = {name: self._arena.base + at for name, at in offsets.items()}
        sizes = {
            f"{i} {name}": array.nbytes
            for i, one in enumerate(self.operations)
            for name, array in one.weights.items()
        }
        self.weight_bytes = sum(sizes.values())
        self._weights = Arena(sizes)
        self._steps, self._blocks, self._in, self._out = self._compiled()

    @staticmethod
    def _image(graph: Graph, name: str) -> Image:
        found = image_of(graph, name) or bytes_of(graph, name)
        assert found is not None, name
        return found

    def _values(self) -> list[str]:
        """Values that have a place; those that only pass a border have none."""
        passing = {*self._passing[0], *self._passing[1]}
        names = dict.fromkeys([*self.inputs, *(one.makes for one in self.operations)])
        return [name for name in names if name not in passing]

    def _lives(self) -> dict[str, Life]:
        last: dict[str, int] = {}
        for i, one in enumerate(self.operations):
            last.update(dict.fromkeys(one.inputs, i))
        last.update(dict.fromkeys(self.outputs, len(self.operations)))
        first = dict.fromkeys(self.inputs, -1)
        first |= {one.makes: i for i, one in enumerate(self.operations)}
        return {
            name: Life(self._images[name].n_bytes, first[name], last.get(name, first[name]))
            for name in self._values()
        }

    def _compiled(self) -> tuple[np.ndarray, np.ndarray, dict[str, int], dict[str, int]]:
        """Steps, argument blocks, and the slots that get the addresses of inputs and outputs."""
        calls: list[tuple[str, list[Any]]] = []
        borders: list[dict[str, int]] = [{}, {}]  # calls that know what lies outside
        reading, making = self._passing
        for name in self.inputs:
            if name not in reading:
                borders[0][name] = len(calls)
                calls.append(self._border("gather", name, [0, self._at[name]]))
        for i, operation in enumerate(self.operations):
            own = {}
            for name, array in operation.weights.items():
                self._weights.view(f"{i} {name}", "u1")[:] = array.reshape(-1).view(np.uint8)
                own[name] = self._weights.address(f"{i} {name}")
            operation.weights = {}  # they are in the arena
            kernel, slots = operation.kernel, operation.slots
            if reading.get(operation.reads[0]) is operation:
                borders[0][operation.reads[0]] = len(calls)
                kernel, slots = operation.at_border or (kernel, slots)
            elif making.get(operation.makes) is operation:
                borders[1][operation.makes] = len(calls)
                kernel, slots = operation.at_border or (kernel, slots)
            found = slots(operation, self._at | own)
            calls.append((kernel, [0 if value is None else value for value in found]))
        for name in self.outputs:
            if name not in making:
                borders[1][name] = len(calls)
                calls.append(self._border("scatter", name, [self._at[name], 0]))
        addresses = self._engine.addresses({kernel for kernel, _ in calls})
        starts = np.cumsum([0, *(len(slots) for _, slots in calls)])
        blocks = np.concatenate([argument_block(slots) for _, slots in calls])
        steps = np.zeros((len(calls), STEP_SLOTS), np.int64)
        steps[:, 0] = [addresses[kernel] for kernel, _ in calls]
        steps[:, 1] = blocks.ctypes.data + 8 * starts[:-1]
        steps[:, 2] = STEP_BARRIER
        ins = {name: int(starts[i]) + _FROM for name, i in borders[0].items()}
        outs = {name: int(starts[i]) + _TO for name, i in borders[1].items()}
        return steps, blocks, ins, outs

    def _border(self, kernel: str, name: str, ends: list[int]) -> tuple[str, list[Any]]:
        """A call that brings a value in or out as it is."""
        one = self._images[name]
        sizes = [one.images, one.channels, one.pixels]
        if one.item == 4:
            return f"images_{kernel}", [*ends, *sizes, one.padded]
        more = added(self._types[name])
        return f"images_{kernel}_u8", [*ends, *sizes, one.pixel_bytes, more]

    def types(self) -> dict[str, Any]:
        """Of outputs: all are known before."""
        return {}

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs for inputs.

        Raises:
            CancelledError: somebody cancelled it.
        """
        held = [np.ascontiguousarray(values[name]) for name in self.inputs]
        for name, array in zip(self.inputs, held, strict=True):
            self._blocks[self._in[name]] = array.ctypes.data
        found = {
            name: np.empty(self._shapes[name], tensor_dtype_to_np_dtype(self._types[name]))
            for name in self.outputs
        }
        for name, array in found.items():
            self._blocks[self._out[name]] = array.ctypes.data
        if not self._engine.team.run(self._steps):
            raise CancelledError("the network was cancelled")
        return found
