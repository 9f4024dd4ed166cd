"""Which plan of a network has memory for its values and weights, under which budget."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakSet, ref

from headrace.errors import BudgetError, HeadraceError
from headrace.loaders.onnx_model import OnnxModel
from headrace.loaders.progress import Progress
from headrace.memory import give_back_heap
from headrace.networks.engine import Engine
from headrace.networks.host_memory import free_bytes
from headrace.networks.needs import OTHERS, Needs, NetworkMemory, decide
from headrace.offload.modes import FlashRate, ReadMode
from headrace.promises import promise

if TYPE_CHECKING:
    from headrace.networks.network_plan import NetworkPlan
    from headrace.networks.streaming import Kept, NetworkStreaming


WATCHED_BYTES = 64 << 20  # what needs less fits without a look at what is free
LARGE_SHARE = 16  # of a budget: sessions that take more go before there are others


class Residence:
    """Memory for the plans of a network: without a budget for all, with one for one at a time.

    A plan whose turn it is takes over what it can of the weights of the one before.

    Args:
        model: the network's file.
        engine: its kernels and threads.
        budget: bytes that the network may take beside the process; None: as many as it does, or as
            are free where that is less.
        progress: of packing weights.

    Attributes:
        budget: as given, or what was free; `change` changes it.
        streaming: what the plan reads that has memory; None: all of it is there.
    """

    def __init__(
        self, model: OnnxModel, engine: Engine, budget: int | None, progress: Progress | None
    ) -> None:
        self._model, self._engine, self._progress = model, engine, progress
        self.budget = budget
        self._reserved: dict[str, int] = {}  # what plans took at most of what is no weight
        # Plans know this: in a circle, threads might outlive the kernels that they run.
        self._in_use: ReferenceType[NetworkPlan] | None = None
        self._known: WeakSet[NetworkPlan] = WeakSet()
        self._kept: Kept = {}
        self._rates: dict[ReadMode, FlashRate] = {}
        self.streaming: NetworkStreaming | None = None

    @property
    def _plan(self) -> NetworkPlan | None:
        return None if self._in_use is None else self._in_use()

    @property
    def has_files(self) -> bool:
        """Whether the network came as a file."""
        return self._model.path is not None

    @property
    def name(self) -> str:
        """Of the network, for messages."""
        return "this network" if self._model.path is None else self._model.path.name

    @property
    def graph_bytes(self) -> int:
        """Of what the file says of the network, with the weights that stand among its nodes."""
        return self._model.graph_bytes

    def add(self, plan: NetworkPlan) -> None:
        """A plan is there, and stays until it is forgotten."""
        self._known.add(plan)

    def memory_of(self, plan: NetworkPlan) -> NetworkMemory:
        """What a plan takes, and those of other shapes that are there beside it.

        Raises:
            BudgetError: more than there may be.
        """
        budget = self.budget
        if budget is None and self.has_files and not plan.is_linked:
            budget = _free_for(plan.needs)
        others = sum(one.idle_bytes for one in self._known if one is not plan)
        try:
            return decide(plan.needs, budget, self._reserved, self.name, others)
        except BudgetError:  # room for what other shapes took is no need
            return decide(plan.needs, budget, {}, self.name, others)

    def is_large(self, plan: NetworkPlan) -> bool:
        """Whether a plan that has no turn takes too much to be there while another is made."""
        return self.budget is not None and plan.host_bytes > self.budget // LARGE_SHARE

    def is_short(self, plan: NetworkPlan) -> bool:
        """Whether a plan does not fit beside those of other shapes."""
        if self.budget is None or self._plan is plan:
            return False
        try:
            self.memory_of(plan)
        except BudgetError:
            return True
        return False

    def use(self, plan: NetworkPlan) -> None:
        """Have memory for a plan.

        Raises:
            BudgetError: it does not fit, or the system gives none.
            KernelError: a kernel cannot be had.
            HeadraceError: weights cannot be packed or read.
        """
        if self._plan is plan or (self.budget is None and plan.is_linked):
            return
        memory = self.memory_of(plan)
        if memory.budget is None:
            plan.link(None, again=False)
            return
        self.budget = memory.budget
        plan.load_kernels()  # compiling takes memory of its own
        parts = plan.needs.fixed | {"rows": plan.needs.row_bytes, OTHERS: 0}
        self._reserved = {
            k: min(max(n, self._reserved.get(k, 0)), memory.parts.get(k, n))
            for k, n in parts.items()
        }
        before = self._plan
        fits = before is not None and memory.n_bytes + _alone(before, plan) <= self.budget
        if before is not None and fits and self.streaming is None and not _reads(memory):
            before.empty()
            plan.link(None, again=True)  # weights that both have are there once
            before.release()
        else:
            self.release()
            if _reads(memory):
                from headrace.networks.streaming import NetworkStreaming  # most networks do not

                self.streaming = NetworkStreaming(
                    plan.needs, memory, self._engine, self._model, self._rates, self._kept,
                    self._progress,
                )  # fmt: skip
            else:
                self._kept.clear()
            try:
                plan.link(self.streaming, again=True)
            except BaseException:
                plan.release()
                self.release()
                raise
        self._in_use = ref(plan)
        promise(self, memory.n_bytes)

    def forget(self, plan: NetworkPlan) -> None:
        """A plan is not used any more."""
        self._known.discard(plan)
        if self._plan is plan:
            self.release()

    def tidy(self) -> None:
        """Give back what plans had that were forgotten, where memory is counted."""
        if self.budget is not None:
            gc.collect()  # they are in circles with what makes their weights
            give_back_heap()

    def change(self, budget: int) -> None:
        """Have another budget, from the next run on.

        Raises:
            BudgetError: it is too small for the plan that has memory; all is as before.
            HeadraceError: the network was loaded without one.
        """
        if self.budget is None:
            raise HeadraceError(
                "this network was loaded without `memory`, and has forgotten what its weights are "
                "made of: load it with one, which can be changed"
            )
        if self._plan is not None:
            decide(self._plan.needs, budget, {}, self.name)  # others can go
        self.budget = budget
        self.release()

    def release(self) -> None:
        """Give memory back; pieces of weights stay for the next plan, till that knows better."""
        plan = self._plan
        if plan is not None:
            plan.release()
        self._in_use = None
        if self.streaming is not None:
            self.streaming.close()
            self.streaming = None

    def close(self) -> None:
        """Give all memory back."""
        self.release()
        self._kept.clear()

    def __del__(self) -> None:
        # Readers run a kernel of the engine's: they must have ended before that goes.
        if getattr(self, "streaming", None) is not None:
            self.release()


def _free_for(needs: Needs) -> int | None:
    """What is free, if a plan needs more; None: it does not."""
    if needs.weights + sum(needs.fixed.values()) < WATCHED_BYTES:
        return None
    free = free_bytes()
    needed = decide(needs, None, {}, "").whole
    return None if free is None or needed <= free else max(1, free)


def _alone(before: NetworkPlan, plan: NetworkPlan) -> int:
    """Bytes of weights that a plan has, and the one behind it does not."""
    keys = plan.weight_bytes_by_key.keys()
    return sum(n for key, n in before.weight_bytes_by_key.items() if key not in keys)


def _reads(memory: NetworkMemory) -> bool:
    return memory.residency is not None or memory.from_file
