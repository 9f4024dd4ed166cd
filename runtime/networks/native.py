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
from headrace.networks.layout import GIVEN, Layout, scratch_of
from headrace.networks.operation import Operation
from headrace.networks.passes.into_convolutions import into_convolutions
from headrace.networks.patch_choice import Choice, with_patches
from headrace.networks.quantisation import elem_type


class NativeRegion:
    """Nodes that all have kernels of ours.

    Args:
        graph: that has the nodes.
        nodes: in order.
        operations: of each of them; they are the region's from now on.
        outputs: values that somebody else wants.
        engine: threads and kernels.
        patches: whether its first operations run patch by patch (`headrace.networks.patch_choice`).

    Attributes:
        inputs, outputs: names.
        operations: that are left of the nodes.
        layout: where their values lie.
        patches: what runs patch by patch; None: nothing.
        arena_bytes, weight_bytes: that it takes; weights may be shared with other regions.

    Raises:
        KernelError: a kernel does not compile, or there is no compiler.
        BudgetError: the system gives no memory.
    """

    by_reference = None

    def __init__(
        self, graph: Graph, nodes: Sequence[Node], operations: Sequence[Operation],
        outputs: Sequence[str], engine: Engine, patches: Choice = "off",
    ) -> None:  # fmt: skip
        self.nodes = list(nodes)
        self.outputs = list(outputs)
        operations = [one for first in operations for one in (first, *first.also)]
        made = {one.makes for one in operations}
        wanted = [n for one in operations for n in (*one.inputs, *one.plain)]
        self.inputs = list(dict.fromkeys(n for n in wanted if n not in made))
        operations = into_convolutions(operations, set(outputs))
        ends = self.inputs, self.outputs, engine.threads
        operations, self.patches = with_patches(graph, operations, *ends, patches)
        self._engine = engine
        self._types = {name: elem_type(graph, name) for name in self.outputs}
        self._shapes = {name: graph.shape(name) or () for name in self.outputs}
        self.layout = Layout(graph, operations, *ends)
        self.operations, self.arena_bytes = self.layout.operations, self.layout.arena_bytes
        self._arena = Arena({"values": self.arena_bytes})
        self._weights: list[Any] = []  # they go with the last region that has them
        self.weight_bytes = 0
        self._steps, self._blocks, self._from_outside = self._compiled()

    def _compiled(self) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str, int]]]:
        """Steps, argument blocks, and where in these which address comes with what added to it."""
        layout = self.layout
        at = layout.addresses(self._arena.base)
        own: dict[int, dict[str, int]] = {}  # of operations that share their weights
        calls: list[tuple[str, list[Any]]] = []
        for operation in layout.moves_in():
            calls.append((operation.kernel, operation.slots(operation, at)))
        for i, operation in enumerate(self.operations):
            if id(operation.weights) not in own:
                own[id(operation.weights)] = self._placed_weights(operation)
            places = own[id(operation.weights)]
            if operation.scratch:
                places = places | {"scratch": at[scratch_of(i)]}
            calls.append((operation.kernel, operation.slots(operation, at | places)))
        for operation in layout.moves_out():
            calls.append((operation.kernel, operation.slots(operation, at)))
        addresses = self._engine.addresses({kernel for kernel, _ in calls})
        starts = np.cumsum([0, *(len(slots) for _, slots in calls)])
        blocks = np.concatenate([argument_block(slots) for _, slots in calls])
        steps = np.zeros((len(calls), STEP_SLOTS), np.int64)
        steps[:, 0] = [addresses[kernel] for kernel, _ in calls]
        steps[:, 1] = blocks.ctypes.data + 8 * starts[:-1]
        steps[:, 2] = STEP_BARRIER
        ends = list(layout.outside)
        from_outside = [
            (int(at), ends[int(blocks[at] - GIVEN) >> 44], int(blocks[at]) & ((1 << 44) - 1))
            for at in np.flatnonzero(blocks >= GIVEN)
        ]
        return steps, blocks, from_outside

    def _placed_weights(self, operation: Operation) -> dict[str, int]:
        """Addresses, in memory that this region keeps; the operation's own ones go."""
        weights = operation.weights
        if operation.affine is not None:
            weights |= dict(zip(("scales", "shifts"), operation.affine, strict=True))
        placed = {name: self._engine.weights.placed(weight) for name, weight in weights.items()}
        weights.clear()
        self._weights += placed.values()
        self.weight_bytes += sum(arena.n_bytes for arena in placed.values())
        return {name: arena.base for name, arena in placed.items()}

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
        for at, name, more in self._from_outside:
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
