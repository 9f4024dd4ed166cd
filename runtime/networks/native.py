"""A run of operators on kernels of ours, as one native call."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype

from headrace.errors import BudgetError, CancelledError, HeadraceError
from headrace.kernels.execute import STEP_BARRIER, STEP_GIVE, STEP_SLOTS, STEP_WAIT
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.networks.engine import Engine
from headrace.networks.graph import Graph, Node
from headrace.networks.layout import GIVEN, SCRATCH, Layout
from headrace.networks.operation import Addresses, Operation, Weight
from headrace.networks.passes.bands import in_bands
from headrace.networks.passes.into_convolutions import into_convolutions
from headrace.networks.patch_choice import Choice, with_patches
from headrace.networks.quantisation import elem_type
from headrace.networks.weight_store import Held

if TYPE_CHECKING:
    from headrace.networks.streaming import TilesAt
    from headrace.offload.window import Window
from headrace.sizes import format_size
from headrace.team import Team

# Multiply-adds, and values that are made by 8 of these: what takes about 40 us. Other threads would
# be woken, and waited for after each operation, for less than that.
_LITTLE, _OF_A_VALUE = 2_000_000, 8
# What takes more than 0.1 s at that rate runs where Ctrl-C can interrupt it.
_MUCH = 5_000_000_000
_WITHIN = (1 << 44) - 1  # of what stands for an address outside, bytes from the value's begin


class WeightSource(Protocol):
    """Weights that do not all stay in memory, as `headrace.networks.streaming` has them."""

    @property
    def window(self) -> Window | None:
        """That steps wait for; None: nothing is read while they run."""

    @property
    def address(self) -> int:
        """Of the window; 0: there is none."""

    def parts(self, operation: Operation, name: str) -> list[TilesAt] | None:
        """Where the tiles of an operation's weight are, in order; None: it is not among these."""

    def rows(self, operation: Operation) -> dict[str, int] | None:
        """Addresses of the rows that an operation takes, and of what stands for their ids."""

    def fetch(self, operation: Operation, values: Mapping[str, np.ndarray]) -> None:
        """Bring the rows that ids choose, which have been checked."""


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
        arena_bytes, weight_bytes: that it takes as soon as it is linked; weights may be shared with
            other regions.
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
        if self.patches is None:
            operations = in_bands(graph, operations, set(outputs))
        self._engine = engine
        self._shapes = {n: shape for n in self.inputs if (shape := graph.shape(n)) is not None}
        self._results = [
            (name, graph.shape(name) or (), np.dtype(tensor_dtype_to_np_dtype(type_)))
            for name in self.outputs
            for type_ in [elem_type(graph, name)]
        ]
        self.layout = Layout(graph, operations, *ends)
        self.operations, self.arena_bytes = self.layout.operations, self.layout.arena_bytes
        self.weight_bytes = sum(
            weight.nbytes if isinstance(weight, np.ndarray) else weight.n_bytes
            for weights in {id(one.weights): one.weights for one in self.operations}.values()
            for weight in weights.values()
        )
        # What each call goes through is found here: behind a run caches have nothing of Python's.
        self._bounded = [one for one in self.operations if one.bounds]
        self._own: _Own | None = None
        self._linked: _Linked | None = None

    def link(self, streaming: WeightSource | None, *, again: bool) -> None:
        """Take memory for values and weights.

        Args:
            streaming: has some of the weights; None: all are taken.
            again: whether this may be done once more, after `release`; else what weights are made
                of is forgotten.

        Raises:
            KernelError: a kernel does not compile, or there is no compiler.
            BudgetError: the system gives no memory.
            ModelFileError: a weight cannot be read.
        """
        if self._own is None:
            self._own = _Own(self.operations)
        self._linked = _Linked(self, self._engine, self._own, streaming)
        if not again:
            for one in self.operations:
                one.weights.clear()

    def load_kernels(self) -> None:
        """Have its kernels, compiled if need be.

        Raises:
            KernelError: one does not compile, or there is no compiler.
        """
        layout = self.layout
        moves = [*layout.moves_in(), *layout.moves_out()]
        self._engine.addresses({one.kernel for one in (*moves, *self.operations)})
        _ = self.team

    @property
    def team(self) -> Team:
        """The threads that compute it: the caller alone, where there is little to do.

        Raises:
            KernelError: there is no compiler.
        """
        return self._engine.alone if self.work < _LITTLE else self._engine.team

    @property
    def work(self) -> int:
        """Multiply-adds, and what else there is to do in these."""
        values = sum(image.n_bytes // image.item for image in self.layout.images.values())
        return sum(one.macs for one in self.operations) + _OF_A_VALUE * values

    @property
    def is_linked(self) -> bool:
        """Whether it has memory."""
        return self._linked is not None

    def weights(self) -> list[Held | Arena]:
        """Memory of its weights, some of them other regions' as well; none before it is linked."""
        if self._linked is None or self._own is None:
            return []
        return [*self._linked.held, self._own.arena]

    @property
    def own_bytes(self) -> int:
        """Of what operations have for themselves alone, before it is linked."""
        return sum(array.nbytes for array in _own_arrays(self.operations).values())

    @property
    def result_bytes(self) -> int:
        """Of the arrays that a run gives."""
        return sum(math.prod(shape) * of.itemsize for _, shape, of in self._results)

    def empty(self) -> None:
        """Give the memory of values back, and no more be run."""
        if self._linked is not None:
            self._linked.arena.empty()

    def release(self) -> None:
        """Give the memory back, but for what operations have for themselves alone."""
        self.empty()
        self._linked = None

    def types(self) -> dict[str, Any]:
        """Of outputs: all are known before."""
        return {}

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs for inputs, of a region that is linked.

        Raises:
            HeadraceError: an index is out of bounds, or an input is not as large as it should be.
            CancelledError: somebody cancelled it, or a read failed.
            ModelFileError: rows of a table cannot be read.
        """
        linked = self._linked
        assert linked is not None
        held = {name: np.ascontiguousarray(values[name]) for name in self.inputs}
        try:
            found = {name: np.empty(shape, of) for name, shape, of in self._results}
        except MemoryError:
            raise BudgetError(
                f"the system refuses {format_size(self.result_bytes)} of memory for what "
                f"{', '.join(self.outputs[:3])} are to hold: give the network smaller inputs",
                needed_bytes=self.result_bytes,
            ) from None
        self._check(held)
        if not linked.run(held, found):
            raise CancelledError("the network was cancelled")
        return found

    def _check(self, held: Mapping[str, np.ndarray]) -> None:
        for name, shape in self._shapes.items():
            if held[name].shape != shape:  # what onnxruntime made, kernels would read beyond
                raise HeadraceError(
                    f"{name} has the shape {list(held[name].shape)} where the operators in front "
                    f"of it are said to make {list(shape)}: please report this network"
                )
        for one in self._bounded:
            for name, (least, most) in one.bounds.items():
                array = held[name]
                if array.min() < least or array.max() > most:
                    wrong = array.min() if array.min() < least else array.max()
                    raise HeadraceError(
                        f"{one.nodes[0].label}: {name} has an element {wrong}, and the table has "
                        f"entries from {least} to {most}"
                    )


class _Own:
    """What operations have for themselves alone, biases above all: it stays as long as they do.

    Attributes:
        arena: that it lies in: pages for each would be many times as much.
        places: addresses, by the operations' weights.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        found = _own_arrays(operations)
        names = {(of, name): f"{i} {name}" for i, (of, name) in enumerate(found)}
        self.arena = Arena({names[key]: found[key].nbytes for key in found}, huge=False)
        self.places: dict[int, dict[str, int]] = {id(one.weights): {} for one in operations}
        for key, array in found.items():
            view = self.arena.view(names[key])
            view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.places[key[0]][key[1]] = self.arena.address(names[key])
        for operation in operations:
            for name in self.places[id(operation.weights)]:
                operation.weights.pop(name, None)


def _own_arrays(operations: Sequence[Operation]) -> dict[tuple[int, str], np.ndarray]:
    """By the operations' weights, and name."""
    found: dict[tuple[int, str], np.ndarray] = {}
    for one in operations:
        arrays = {k: w for k, w in one.weights.items() if isinstance(w, np.ndarray)}
        if one.affine is not None:
            arrays |= dict(zip(("scales", "shifts"), one.affine, strict=True))
        found |= {(id(one.weights), name): array for name, array in arrays.items()}
    return found


class _Linked:
    """A region with memory: steps and argument blocks for the native loop.

    Args:
        region: of which operations have their weights, as far as `streaming` does not.
        own: what they have for themselves alone.
    """

    def __init__(
        self, region: NativeRegion, engine: Engine, own: _Own, streaming: WeightSource | None
    ) -> None:
        # Not the region: in a circle, threads might outlive the kernels that they run.
        self._engine, self._streaming = engine, streaming
        self._team = engine.team if streaming is not None else region.team
        self._is_long = streaming is not None or region.work > _MUCH
        self._from_tables = [one for one in region.operations if one.table is not None]
        self.arena = Arena({"values": region.arena_bytes})
        self._own = own
        # Weights; they go with the last region that has them.
        self.held, held = self._all_held(region.operations)
        layout = region.layout
        at = layout.addresses(self.arena.base)
        placed: dict[int, dict[str, int]] = {}  # of operations that share their weights
        calls: list[_Call] = []
        for operation in layout.moves_in():
            calls.append(_Call(operation.kernel, operation.slots(operation, Addresses(at))))
        for operation in region.operations:
            if id(operation.weights) not in placed:
                placed[id(operation.weights)] = (
                    self._placed(operation) | held[id(operation.weights)]
                )
            places = placed[id(operation.weights)]
            if operation.scratch:
                places = places | {"scratch": at[SCRATCH]}
            calls += self._calls(operation, Addresses(at, places))
        for operation in layout.moves_out():
            calls.append(_Call(operation.kernel, operation.slots(operation, Addresses(at))))
        self._steps, self._blocks = self._table(calls)
        ends = list(layout.outside)
        self._from_outside = [
            (int(at), ends[int(self._blocks[at] - GIVEN) >> 44], int(self._blocks[at]) & _WITHIN)
            for at in np.flatnonzero(self._blocks >= GIVEN)
        ]

    def _all_held(
        self, operations: Sequence[Operation]
    ) -> tuple[list[Held], dict[int, dict[str, int]]]:
        """The weights that stay in memory, and their addresses by the operations' weights."""
        wanted = [
            (of, name, weight)
            for of, one in {id(one.weights): one for one in operations}.items()
            for name, weight in one.weights.items()
            if name not in self._placed(one) and self._parts(one, name) is None
            if isinstance(weight, Weight)  # others are in `own`
        ]
        held = self._engine.weights.placed([weight for _, _, weight in wanted])
        places: dict[int, dict[str, int]] = {id(one.weights): {} for one in operations}
        for (of, name, _), one in zip(wanted, held, strict=True):
            places[of][name] = one.base
        return held, places

    def _placed(self, operation: Operation) -> dict[str, int]:
        """Addresses of what an operation has for itself, and of rows that come when wanted."""
        rows = None if self._streaming is None else self._streaming.rows(operation)
        return self._own.places[id(operation.weights)] | (rows or {})

    def _parts(self, operation: Operation, name: str) -> list[TilesAt] | None:
        return None if self._streaming is None else self._streaming.parts(operation, name)

    def _calls(self, operation: Operation, at: Addresses) -> list[_Call]:
        """Of an operation: one, or one for each part of its weights, without barriers between."""
        name, parts = next(
            ((n, p) for n in operation.weights if (p := self._parts(operation, n)) is not None),
            ("", []),
        )
        if not parts:
            return [_Call(operation.kernel, operation.slots(operation, at))]
        if operation.cut is None or not parts[0].tiles:
            (one,) = parts
            slots = operation.slots(operation, at.having(name, one.address))
            return [_Call(operation.kernel, slots, one.request)]
        whole = operation.slots(operation, at.having(name, 0))
        found = []
        for one in parts:
            slots = operation.cut.part(whole, one.first, one.tiles)
            slots[0] = operation.cut.address(one.address, one.first)
            found.append(_Call(operation.kernel, slots, one.request, one is parts[-1]))
        return found

    def _table(self, calls: Sequence[_Call]) -> tuple[np.ndarray, np.ndarray]:
        addresses = self._engine.addresses({call.kernel for call in calls})
        starts = np.cumsum([0, *(len(call.slots) for call in calls)])
        blocks = np.concatenate([argument_block(call.slots) for call in calls])
        steps = np.zeros((len(calls), STEP_SLOTS), np.int64)
        steps[:, 0] = [addresses[call.kernel] for call in calls]
        steps[:, 1] = blocks.ctypes.data + 8 * starts[:-1]
        steps[:, 2] = [STEP_BARRIER if call.barrier else 0 for call in calls]
        window = None if self._streaming is None else self._streaming.window
        for i, call in enumerate(calls):
            if call.request is not None and window is not None:
                steps[i, 2] |= STEP_WAIT | STEP_GIVE
                steps[i, 5] = window.request(call.request)
        return steps, blocks

    def run(self, held: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> bool:
        """Compute outputs in their memory; False: it was cancelled on the way."""
        streaming = self._streaming
        if streaming is not None:
            for one in self._from_tables:
                streaming.fetch(one, held)
        for at, name, more in self._from_outside:
            self._blocks[at] = (found if name in found else held)[name].ctypes.data + more
        interruptible = self._is_long and threading.current_thread() is threading.main_thread()
        window = 0 if streaming is None else streaming.address
        return self._team.run(self._steps, interruptible=interruptible, window=window)


class _Call(NamedTuple):
    """Of a kernel; `request`: the read that it waits for (None: none)."""

    kernel: str
    slots: list[Any]
    request: int | None = None
    barrier: bool = True
