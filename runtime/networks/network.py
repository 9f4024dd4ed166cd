"""`Network`: an ONNX or TFLite model that can be called."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.arguments import size_of
from headrace.errors import HeadraceError
from headrace.loaders.onnx_model import OnnxModel, from_proto, open_onnx
from headrace.loaders.progress import Progress
from headrace.loaders.reader import TensorReader
from headrace.loaders.tflite import SUFFIX, open_tflite
from headrace.networks.branches import Decisions
from headrace.networks.engine import Engine
from headrace.networks.graph import Graph, TensorType, graph_of
from headrace.networks.network_plan import NetworkPlan
from headrace.networks.patch_choice import Choice
from headrace.networks.ports import (
    NO_TENSORS,
    check_inputs,
    check_names,
    port_of,
    type_of,
    types_key,
)
from headrace.networks.residence import Residence
from headrace.sizes import format_size
from headrace.team import default_threads

if TYPE_CHECKING:
    from headrace.networks.packed_file import PackedFile
    from headrace.networks.prediction import Prediction

MOST_PLANS = 8  # of shapes that were used last
MOST_FITTING = 256  # types of inputs that are remembered to be the network's


class Network:
    """A network of an ONNX or TFLite file.

    For inputs of each combination of shapes a plan is made, when they first come, and kept. Calls
    from several threads take turns.

    Args:
        model: a validated model.
        threads: that compute; default: the physical cores that this process may use.
        patches: whether first operations run patch by patch, which takes less memory and more time:
            "auto", "off", or so many rows and columns of patches; None: as "auto" where it does not
            fit in `memory` otherwise, else "off".
        memory: bytes that it may take beside the process; what does not fit of its weights is read
            from a file for every call. None: as many as it takes, if those are free.
        progress: called while weights are packed for that.
        target: CPU level whose kernels run, such as "x86-64-v3"; None: the best that this CPU has.
            What onnxruntime runs takes what it finds.

    Raises:
        KernelError: there is no such target, or this CPU cannot run it.

    Attributes:
        path: of the file; None: it came as bytes.
        model: what the file says.
        inputs, outputs: what it takes and gives.
    """

    def __init__(
        self, model: OnnxModel, *, threads: int | None = None, patches: Choice | None = None,
        memory: int | None = None, progress: Progress | None = None, target: str | None = None,
    ) -> None:  # fmt: skip
        self.path = model.path
        self.threads = default_threads() if threads is None else threads
        self.model = model
        self._reader = TensorReader()
        self._graph: Graph | None = graph_of(model, self._reader, target)
        ports = {one.name: port_of(one) for one in model.proto.graph.input}
        self.inputs = tuple(ports[name] for name in self._graph.inputs)
        self.outputs = tuple(port_of(one) for one in model.proto.graph.output)
        self._ports = ports
        numbers = [port.name for port in self.inputs if port.is_number]
        self._decisions = Decisions(self._graph, numbers)
        self._engine = Engine(self.threads, target)
        self._residence = Residence(model, self._engine, memory, progress)
        self._patches = patches
        self._plans: OrderedDict[Any, NetworkPlan] = OrderedDict()
        self._fitting: set[Any] = set()  # types of inputs that need no other look
        self._lock = threading.RLock()

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name.

        Args:
            inputs: arrays by name, of the types and shapes that `self.inputs` says.

        Raises:
            ValueError, TypeError: an input is missing, or of the wrong shape or type.
            HeadraceError: an operator refuses its inputs, or the network is closed.
        """
        check_names(inputs, self.inputs)
        given = {name: self._as_array(name, value) for name, value in inputs.items()}
        types = types_key(given)
        with self._lock:
            if types not in self._fitting:
                check_inputs(given, self._ports, self.inputs)
                if len(self._fitting) >= MOST_FITTING:
                    self._fitting.clear()
                self._fitting.add(types)
            return self._plan(types, given).run(given)

    def plan(self, inputs: Mapping[str, Any]) -> NetworkPlan:
        """What runs for inputs of such types and shapes (arrays, or `TensorType`s).

        Raises:
            TypeError: they are no mapping.
            HeadraceError: nothing here runs an operator, or on so many patches, or the network is
                closed.
        """
        check_names(inputs, self.inputs)
        given = {
            name: value if isinstance(value, TensorType) else self._as_array(name, value)
            for name, value in inputs.items()
        }
        with self._lock:
            return self._plan(types_key(given), given)

    def _plan(self, types: Any, inputs: Mapping[str, Any]) -> NetworkPlan:
        if self._graph is None:
            raise HeadraceError("this network is closed")
        decided = self._decisions.of(inputs)
        key = types, decided
        plan = self._plans.get(key)
        if plan is None:
            known = {n: of for n, value in inputs.items() if (of := type_of(value)) is not None}
            graph = self._with_given(inputs)
            # Sessions of onnxruntime have memory as long as they live.
            self._forget([k for k, one in self._plans.items() if self._residence.is_large(one)])
            plan = self._plans[key] = self._made(graph, known, decided)
            self._residence.add(plan)
            self._forget(list(self._plans)[:-MOST_PLANS])
        self._plans.move_to_end(key)
        while len(self._plans) > 1 and self._residence.is_short(plan):
            self._forget([next(iter(self._plans))])
        return plan

    def _forget(self, keys: Sequence[Any]) -> None:
        for key in keys:
            self._residence.forget(self._plans.pop(key))
        if keys:
            self._residence.tidy()

    def _made(self, graph: Graph, known: Mapping[str, TensorType], decided: Any) -> NetworkPlan:
        """A plan, patch by patch where memory is too short for it otherwise."""
        given = graph, known, self._engine, self._residence
        plan = NetworkPlan(*given, self._patches or "off", decided)
        if self._patches is not None:
            return plan
        budget = self._residence.budget
        if budget is not None and plan.least_bytes > budget and not self._residence.is_large(plan):
            cut = NetworkPlan(*given, "auto", decided)
            if cut.least_bytes < plan.least_bytes:
                return cut
        return plan

    @property
    def target(self) -> str:
        """The CPU level whose kernels run.

        Raises:
            KernelError: there are none for this CPU.
        """
        return self._engine.target.name

    @property
    def memory(self) -> int | None:
        """Bytes that it may take beside the process; None: as many as it does (and as are free).

        May be set while it is loaded with some, as a number of bytes or text as "300MB": more or
        fewer weights stay from the next call on.

        Raises:
            BudgetError: that is too little for inputs as they came last; all is as before.
        """
        return self._residence.budget

    @memory.setter
    def memory(self, memory: int | str) -> None:
        with self._lock:
            self._residence.change(size_of(memory))
            # Sessions keep the bound that they began with.
            self._forget([key for key, plan in self._plans.items() if plan.is_bounded])

    def predict(self, plan: NetworkPlan) -> Prediction:
        """What a run of a plan should take that has no memory yet (as `plan` gives it).

        Raises:
            BudgetError: it does not fit.
            ModelFileError: the file cannot be read.
            KernelError: a kernel cannot be had.
        """
        from headrace.networks.prediction import predict

        with self._lock:
            self._residence.release()
            return predict(plan, plan.memory, self._engine, self.model)

    def packed_file(self, plan: NetworkPlan) -> PackedFile | None:
        """The file that weights of a plan are read from under a budget; None: the model's own."""
        from headrace.networks.streaming import packed_of

        if plan.memory.residency is None and not any(
            one.weight.place is None for one in plan.needs.tables
        ):
            return None
        return packed_of(plan.needs, self.model, self._engine.target.name)

    @property
    def stall_s(self) -> float:
        """Seconds that calls have waited for weights, since there was last another budget."""
        streaming = self._residence.streaming
        return 0.0 if streaming is None else streaming.stall_s

    def notices(self, inputs: Mapping[str, Any]) -> list[str]:
        """What a user should know before the wait, where memory is short for such inputs.

        Raises:
            BudgetError: they do not fit.
        """
        plan = self.plan(inputs)
        memory, found = plan.memory, []
        if self._patches is None:
            found += [
                f"operators {one.first} to {one.last} run on {one.grid} x {one.grid} patches, as "
                f"memory is short: {100 * one.overhead:.0f}% more multiply-adds"
                for one in plan.patches
            ]
        if memory.streamed_bytes:
            found.append(
                f"{format_size(memory.streamed_bytes)} of weights are read from the disk for each "
                f"run; with {format_size(memory.whole)} of memory none would be"
            )
            packed = self.packed_file(plan)
            if packed is not None and not packed.is_there:
                found.append(
                    f"for that, they are packed once: {format_size(packed.n_bytes)} in "
                    f"{packed.path}"
                )
        return found

    def _with_given(self, inputs: Mapping[str, Any]) -> Graph:
        """The graph whose defaults are inputs where they are given."""
        graph = self._graph
        assert graph is not None
        # Initialisers that are inputs as well (before IR version 4 all were) may be given.
        given = [name for name in inputs if name in graph.constants]
        if not given:
            return graph
        constants = graph.constants.hiding(given)
        return Graph(
            graph.nodes, constants, [*graph.inputs, *given], graph.outputs, graph.opsets,
            graph.ir_version, {}, graph.sparse, target=graph.target,
        no_tensors=graph.no_tensors,
        )  # fmt: skip

    def _as_array(self, name: str, value: Any) -> Any:
        """An array whose elements lie in order, unless the input is no tensor."""
        if not isinstance(value, np.ndarray):
            port = self._ports.get(name)
            if port is not None and port.shape is None and port.kind in NO_TENSORS:
                return value
            value = np.asarray(value)
        if value.flags.c_contiguous:
            return value
        return np.ascontiguousarray(value).reshape(value.shape)

    def close(self) -> None:
        """Give its memory back; the network cannot be used again."""
        with self._lock:
            self._residence.close()
            self._plans.clear()
            self._graph = None
            self._engine.close()
            self._reader.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def load_network(
    path: Path, *, threads: int | None = None, patches: Choice | None = None,
    memory: int | None = None, progress: Progress | None = None, target: str | None = None,
) -> Network:  # fmt: skip
    """A network from an ONNX or TFLite file; arguments are those of `Network`.

    Raises:
        ModelNotFoundError, ModelFileError, UnsupportedError: no usable model.
        KernelError: there is no such target, or this CPU cannot run it.
    """
    read = open_tflite if path.suffix.lower() == SUFFIX else open_onnx
    return Network(
        read(path), threads=threads, patches=patches, memory=memory, progress=progress,
        target=target,
    )  # fmt: skip


def network_of(
    proto: Any, *, threads: int | None = None, patches: Choice | None = None,
    memory: int | None = None, target: str | None = None,
) -> Network:  # fmt: skip
    """A network from a ModelProto in memory.

    Raises:
        ModelFileError, UnsupportedError: no usable model.
    """
    return Network(
        from_proto(proto), threads=threads, patches=patches, memory=memory, target=target
    )
