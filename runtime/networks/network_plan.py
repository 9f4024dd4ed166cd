"""What runs for inputs of certain shapes, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.errors import BudgetError, HeadraceError
from headrace.networks.engine import Engine
from headrace.networks.graph import Graph, Node, TensorType
from headrace.networks.host import ARENA_BYTES, HostRegion
from headrace.networks.host_memory import free_bytes, values_bytes, weight_bytes
from headrace.networks.live import live_bytes
from headrace.networks.native import NativeRegion
from headrace.networks.needs import OPERATION_BYTES, Needs, NetworkMemory, decide, needs_of
from headrace.networks.operation import Operation, Weight
from headrace.networks.operators import operation_for
from headrace.networks.patch_choice import Choice, Patches
from headrace.networks.patterns import with_patterns
from headrace.networks.regions import Region, regions_of, regions_that_pay, with_nodes_of_file
from headrace.networks.residence import WATCHED_BYTES, Residence
from headrace.networks.specialise import specialise
from headrace.networks.without_turns import without_turns
from headrace.sizes import format_size

if TYPE_CHECKING:
    from headrace.networks.streaming import NetworkStreaming


class NetworkPlan:
    """A network for inputs of certain types.

    Args:
        graph: of the network.
        inputs: types of those inputs that are tensors.
        engine: threads and kernels.
        patches: whether first operations run patch by patch: "auto", "off", or so many rows and
            columns of patches.
        decided: conditions of `If` nodes, and what they are.
        residence: gives it memory when it is to run.

    Attributes:
        graph: what is left of it for these inputs.
        regions: in the order in which they run.
        runs: what computes each of them.

    Raises:
        UnsupportedError: nothing here runs an operator.
        BudgetError: what onnxruntime takes for weights is more than there may be.
        HeadraceError: there is nothing that runs on so many patches.
    """

    def __init__(
        self, graph: Graph, inputs: Mapping[str, TensorType], engine: Engine, residence: Residence,
        patches: Choice = "off", decided: Iterable[tuple[str, bool]] = (),
    ) -> None:  # fmt: skip
        self._residence, self._threads = residence, engine.threads
        as_it_is = without_turns(specialise(graph, inputs, decided))
        fused = with_patterns(as_it_is)
        ours = _ours(fused)
        self.regions = regions_that_pay(fused, lambda node: id(node) in ours)
        self.graph = fused
        if not any(region.ours for region in self.regions):
            self.graph = as_it_is
            self.regions = regions_of(as_it_is, lambda node: False)
        self.regions = with_nodes_of_file(self.regions, self.graph, as_it_is)
        self._check_host()
        room = self._room_for_host(
            [ours[id(node)] for region in self.regions if region.ours for node in region.nodes]
        )
        self.runs: list[HostRegion | NativeRegion] = []
        mixed = any(region.ours for region in self.regions)
        for region in self.regions:
            run: HostRegion | NativeRegion
            if region.ours:
                operations = [ours[id(node)] for node in region.nodes]
                run = NativeRegion(
                    self.graph, region.nodes, operations, region.outputs, engine, patches
                )
            else:
                run = HostRegion(
                    self.graph, region.nodes, region.outputs, engine.threads,
                    spins=not mixed, budget=room,
                )  # fmt: skip
            self.graph.types.update(
                {n: of for n, of in run.types().items() if n not in self.graph.types}
            )
            self.runs.append(run)
        if isinstance(patches, int) and not self.patches:
            raise HeadraceError(
                f"no first operations of this network run on {patches} x {patches} patches: they "
                "take images on kernels of headrace; use fewer patches, or leave `patches` out"
            )
        self._streaming: NetworkStreaming | None = None
        self._last_use = _last_uses(self.regions, self.graph.outputs)

    def _check_host(self) -> None:
        """Sessions of onnxruntime take their memory as soon as they are there: weights, and what it
        makes of constants.
        """
        host = [region for region in self.regions if not region.ours]
        nodes = [n for region in host for one in region.nodes for n in one.originals]
        weights = weight_bytes(self.graph, nodes)
        needed = weights + sum(values_bytes(self.graph, r.nodes, [], r.outputs) for r in host)
        budget, given = self._residence.budget, "(`memory`)"
        if not weights and needed <= WATCHED_BYTES:
            return  # what else there is, is said with it
        if budget is None and needed > WATCHED_BYTES:
            budget, given = free_bytes(), "that are free"
        if budget is not None and needed > budget:
            raise BudgetError(
                f"{self._residence.name} does not fit in {format_size(budget)} {given}: its "
                f"operators that onnxruntime runs ({nodes[0].label} and others) take "
                f"{format_size(weights)} for weights, which cannot be read while it runs, and "
                f"{format_size(needed - weights)} for values; allow more than that",
                needed_bytes=needed,
            )

    def _room_for_host(self, ours: Sequence[Operation]) -> int | None:
        """What the budget leaves for values whose sizes are not known, beside ours and outputs."""
        budget = self._residence.budget
        if budget is None or all(region.ours for region in self.regions):
            return None
        natives = needs_of(ours, self._threads, {}, files=self._residence.has_files)
        beside = natives.weights + natives.making + 2 * live_bytes(self.graph)
        return max(ARENA_BYTES, (budget - beside) // 2)

    @cached_property
    def needs(self) -> Needs:
        """What it takes, before it has any of it."""
        operations = [one for run in self.natives for one in run.operations]
        host = [run.memory_bytes for run in self.runs if isinstance(run, HostRegion)]
        fixed = {
            "values": self.arena_bytes,
            "results": sum(run.result_bytes for run in self.natives),
            "onnxruntime": sum(host),
            "graph": self._residence.graph_bytes,
            "steps": OPERATION_BYTES * len(operations),
        }
        return needs_of(operations, self._threads, fixed, files=self._residence.has_files)

    @property
    def memory(self) -> NetworkMemory:
        """What it takes under the network's budget.

        Raises:
            BudgetError: more than that.
        """
        return self._residence.memory_of(self)

    @property
    def is_linked(self) -> bool:
        """Whether it has memory."""
        return any(run.is_linked for run in self.natives)

    @property
    def is_bounded(self) -> bool:
        """Whether onnxruntime holds some values below a number, as their sizes are not known."""
        return any(isinstance(run, HostRegion) and run.is_open for run in self.runs)

    @property
    def least_bytes(self) -> int:
        """The smallest budget in which it runs."""
        return decide(self.needs, None, {}, "").least

    @cached_property
    def idle_bytes(self) -> int:
        """What it keeps while plans of other shapes have their turns."""
        own = sum(run.own_bytes for run in self.natives)
        return own + self.host_bytes + self.needs.fixed["steps"]

    @cached_property
    def weight_bytes_by_key(self) -> dict[str, int]:
        """Of its kernels' weights, by what tells one from others of the network."""
        return {
            repr(weight.key): weight.n_bytes
            for run in self.natives
            for one in run.operations
            for weight in one.weights.values()
            if isinstance(weight, Weight)
        }

    @property
    def host_bytes(self) -> int:
        """What onnxruntime has as long as the plan is there."""
        return sum(run.memory_bytes for run in self.runs if isinstance(run, HostRegion))

    def load_kernels(self) -> None:
        """Have all kernels, compiled if need be, before memory is taken.

        Raises:
            KernelError: one does not compile, or there is no compiler.
        """
        for run in self.natives:
            run.load_kernels()

    def link(self, streaming: NetworkStreaming | None, *, again: bool) -> None:
        """Take memory, if it has none; see `NativeRegion.link`."""
        _ = (
            self.needs,
            self.idle_bytes,
            self.weight_bytes_by_key,
        )  # while it is known what weights are made of
        for run in self.natives:
            if not run.is_linked:
                run.link(streaming, again=again)
        self._streaming = streaming

    def empty(self) -> None:
        """Give the memory of values back."""
        for run in self.natives:
            run.empty()

    def release(self) -> None:
        """Give the memory back."""
        for run in self.natives:
            run.release()
        self._streaming = None

    @cached_property
    def natives(self) -> list[NativeRegion]:
        """Those that run on kernels of ours."""
        return [run for run in self.runs if isinstance(run, NativeRegion)]

    @property
    def patches(self) -> list[Patches]:
        """What runs patch by patch."""
        return [run.patches for run in self.natives if run.patches is not None]

    @property
    def arena_bytes(self) -> int:
        """Memory of all values of our kernels, but for inputs and outputs of the network."""
        return sum(run.arena_bytes for run in self.natives)

    def where(self) -> list[tuple[str, list[Node]]]:
        """What the nodes of the file run on, in the order in which they run."""
        return [
            (_runner(run), [n for node in run.nodes for n in node.originals]) for run in self.runs
        ]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name.

        Raises:
            HeadraceError: an operator refuses its inputs, or weights cannot be read.
            BudgetError: it does not fit in the memory that there may be.
        """
        self._residence.use(self)
        streaming, finished = self._streaming, False
        if streaming is None:
            return self._run(inputs)
        streaming.begin()
        try:
            found = self._run(inputs)
            finished = True
        finally:
            streaming.end(finished)  # raises why a read has failed
        return found

    def _run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {name: inputs.get(name) for name in self.graph.inputs}
        for i, run in enumerate(self.runs):
            values.update(run.run(values))
            for name in self._last_use.get(i, ()):
                del values[name]
        return {name: self._output(name, values) for name in self.graph.outputs}

    def _output(self, name: str, values: Mapping[str, Any]) -> Any:
        if name in values:
            value = values[name]
            given = name in self.graph.inputs and isinstance(value, np.ndarray)
            return value.copy() if given else value  # the caller's own array stays the caller's
        return self.graph.constants.array(name)


def _ours(graph: Graph) -> dict[int, Operation]:
    """Operations of the nodes that our kernels are to compute, by the nodes' ids."""
    found = {id(node): operation_for(graph, node) for node in graph.nodes}
    ours = {of: one for of, one in found.items() if one is not None}
    # What a kernel reads as ONNX has it comes from outside.
    plain = {name for one in ours.values() for name in one.plain}
    for node in graph.nodes:
        if plain.intersection(node.outputs):
            ours.pop(id(node), None)
    makers = {name: id(node) for node in graph.nodes for name in node.outputs}
    users = graph.users()
    for node in graph.nodes:
        # Between nodes of the host alone it would be a run for itself.
        of = ours.get(id(node))
        before = [makers[name] for name in node.reads if name in makers]
        behind = [id(one) for name in node.outputs for one in users.get(name, [])]
        if of is None or of.macs or not before or not behind:
            continue
        if not ours.keys() & {*before, *behind}:
            del ours[id(node)]
    return ours


def _runner(run: HostRegion | NativeRegion) -> str:
    if isinstance(run, NativeRegion):
        return "headrace"
    return "onnxruntime" if run.by_reference is None else "reference"


def _last_uses(regions: list[Region], outputs: list[str]) -> dict[int, list[str]]:
    """Values that nobody needs after each region."""
    between = {name for region in regions for name in region.outputs}.difference(outputs)
    last: dict[str, int] = {}
    for i, region in enumerate(regions):
        for node in region.nodes:
            last.update(dict.fromkeys(between.intersection((*node.reads, *node.outputs)), i))
    found: dict[int, list[str]] = {}
    for name, i in last.items():
        found.setdefault(i, []).append(name)
    return found
