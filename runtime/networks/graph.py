"""A network's graph as data: what ONNX says, without its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from headrace.errors import ModelFileError
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.onnx_model import OnnxModel, subgraphs
from headrace.loaders.reader import TensorReader
from headrace.targets.host import pick_target
from headrace.targets.target import Target

SMALL_BYTES = 1 << 16  # constants up to here may be computed ahead, and are kept
CHUNK_BYTES = 1 << 20  # of constants that are read in runs


@dataclass(frozen=True, slots=True)
class TensorType:
    """Type of a value that is a tensor.

    Attributes:
        elem_type: of TensorProto.
        shape: None where it is known only at run time.
    """

    elem_type: int
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Node:
    """An operator's use.

    Attributes:
        captured: outer values that graphs in its attributes read.
        instead_of: nodes of the file that it stands for; none: for itself.
        ours_alone: whether no nodes of the file could stand in for it: it is one of several that
            stand for some together.
    """

    proto: Any
    captured: tuple[str, ...] = ()
    instead_of: tuple[Node, ...] = ()
    ours_alone: bool = False

    @property
    def originals(self) -> tuple[Node, ...]:
        """Nodes of the file that it stands for."""
        return self.instead_of or (self,)

    @property
    def op(self) -> str:
        """Name of the operator."""
        return str(self.proto.op_type)

    @property
    def domain(self) -> str:
        """Of the operator; "" is ai.onnx."""
        return "" if self.proto.domain == "ai.onnx" else str(self.proto.domain)

    @property
    def inputs(self) -> list[str]:
        """Names, in order; "": one that is left out."""
        return list(self.proto.input)

    @property
    def outputs(self) -> list[str]:
        """Names, in order; "": one that nobody wants."""
        return list(self.proto.output)

    @property
    def reads(self) -> list[str]:
        """Every value that it needs."""
        return [name for name in (*self.proto.input, *self.captured) if name]

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.op} {self.proto.name or ', '.join(filter(None, self.outputs))}"

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        import onnx

        for one in self.proto.attribute:
            if one.name == name:
                return onnx.helper.get_attribute_value(one)
        return default


@dataclass(frozen=True)
class Derived:
    """A constant that is computed from others.

    Attributes:
        make: computes it.
        key: what tells it from others of all plans of a network; None: nothing does.
    """

    type: TensorType
    make: Callable[[], np.ndarray]
    key: Any = None


class Constants:
    """Initialisers of a model, read when asked for, and what was computed from them.

    Attributes:
        computed: arrays that are no initialisers.
        derived: what is computed from constants, each time that it is asked for.
    """

    def __init__(
        self, model: OnnxModel, reader: TensorReader, hidden: Set[str] = frozenset()
    ) -> None:
        self._model = model
        self._reader = reader
        self._hidden = hidden
        self.computed: dict[str, Any] = {}
        self.derived: dict[str, Derived] = {}
        self._kept: dict[str, Any] = {}
        self._notes: dict[Any, Any] = {}

    def __contains__(self, name: object) -> bool:
        if name in self.computed or name in self.derived:
            return True
        there = name in self._model.weights or name in self._model.inline
        return there and name not in self._hidden

    def type(self, name: str) -> TensorType:
        """Of a constant; KeyError: it is none."""
        if name in self.computed:
            tensor = self.computed[name]
            return TensorType(tensor.data_type, tuple(tensor.dims))
        if name in self.derived:
            return self.derived[name].type
        shape, elem_type = self._model.shape_and_type(name)
        return TensorType(elem_type, shape)

    @cached_property
    def file_bytes(self) -> int:
        """Of all that the model has."""
        return self._model.weight_bytes + self._model.graph_bytes

    def is_small(self, name: str) -> bool:
        """Whether it may be read to compute something ahead."""
        if name in self.computed:
            return True
        if name in self._model.weights:
            return self._model.weights[name][0].n_bytes <= SMALL_BYTES
        return name in self._model.inline

    def tensor(self, name: str) -> Any:
        """As TensorProto.

        Raises:
            ModelFileError: it cannot be read.
        """
        import onnx

        if name in self.computed:
            return self.computed[name]
        if name in self.derived:
            return onnx.numpy_helper.from_array(self.derived[name].make(), name)
        if name not in self._kept:
            tensor = self._model.constant(name, self._reader)
            if not self.is_small(name):
                return tensor
            self._kept[name] = tensor
        return self._kept[name]

    def array(self, name: str) -> np.ndarray:
        """As an array.

        Raises:
            ModelFileError: it cannot be read.
        """
        import onnx

        if name in self.computed:
            found: np.ndarray = onnx.numpy_helper.to_array(self.computed[name])
            return found
        if name in self.derived:
            return self.derived[name].make()
        return self._model.array(name, self._reader)

    def rows(self, name: str, together: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """A constant in runs of entries of its first dimension, with the first one's number.

        Runs begin at multiples of `together`, and have about `CHUNK_BYTES` where the constant is
        an initialiser of a file.

        Raises:
            ModelFileError: it cannot be read.
        """
        if name in self.computed or name in self.derived:
            yield 0, self.array(name)
        else:
            yield from self._model.rows(name, self._reader, CHUNK_BYTES, together)

    def in_runs(self, name: str) -> bool:
        """Whether `rows` needs no more memory than for a run."""
        return name not in self.computed and name not in self.derived

    def place(self, name: str) -> TensorInfo | None:
        """Where a file has the constant's elements; None: nowhere as they are."""
        if not self.in_runs(name) or name not in self._model.weights:
            return None
        return self._model.weights[name][0]

    def identity(self, name: str) -> Any:
        """What tells a constant from others of all plans of a network; None: nothing does."""
        if name in self.computed:
            return self.computed[name].SerializeToString()
        return self.derived[name].key if name in self.derived else name

    def put(self, array: np.ndarray) -> str:
        """Have a constant that the file does not have: its name is that of its content."""
        import onnx

        name = f"headrace/{array.dtype}{list(array.shape)}/{array.tobytes().hex()}"
        self.computed[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def derive(
        self, name: str, of: TensorType, sources: Sequence[str], make: Callable[[], np.ndarray]
    ) -> None:
        """Have a constant that is computed from others, for this type always in the same way.

        Plans of other shapes may have another one of this name.
        """
        keys = tuple(self.identity(one) for one in sources)
        key = None if None in keys else (name, of.elem_type, of.shape, *keys)
        self.derived[name] = Derived(of, make, key)

    def remembered(self, key: Any, find: Callable[[], Any]) -> Any:
        """What was found of a constant with this key, for all plans of a network."""
        if key not in self._notes:
            self._notes[key] = find()
        return self._notes[key]

    def without(self) -> Constants:
        """The same initialisers, and nothing computed."""
        other = Constants(self._model, self._reader, self._hidden)
        other._kept = self._kept
        other._notes = self._notes
        return other

    def hiding(self, names: Iterable[str]) -> Constants:
        """The same initialisers but these, which are inputs."""
        return Constants(self._model, self._reader, self._hidden | set(names))


@dataclass
class Graph:
    """What is left to compute for inputs of certain types.

    Attributes:
        nodes: in an order in which they can be computed.
        types: of values, as far as known.
        constants: values that are there before anything is computed.
        inputs, outputs: names.
        opsets: versions by domain.
        channels_first: values of three dimensions that lie as images: `channels_first`.
        as_rows: values of four dimensions that lie as rows: `as_rows`.
        no_tensors: TypeProtos of inputs that are sequences, optional or maps.
        target: CPU level whose kernels compute it; None: the best that this CPU has.
    """

    nodes: list[Node]
    constants: Constants
    inputs: list[str]
    outputs: list[str]
    opsets: dict[str, int]
    ir_version: int
    types: dict[str, TensorType] = field(default_factory=dict)
    sparse: dict[str, Any] = field(default_factory=dict)
    channels_first: frozenset[str] = frozenset()
    as_rows: frozenset[str] = frozenset()
    target: str | None = None
    no_tensors: dict[str, Any] = field(default_factory=dict)

    def type(self, name: str) -> TensorType | None:
        """Of a value or constant; None: not known."""
        found = self.types.get(name)
        if found is None and name in self.constants:
            found = self.constants.type(name)
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a value; None: not known."""
        found = self.types.get(name)
        return None if found is None else found.shape

    @property
    def cpu(self) -> Target:
        """The CPU whose kernels compute it.

        Raises:
            KernelError: there are none for this CPU.
        """
        return _cpu(self.target)

    def users(self) -> dict[str, list[Node]]:
        """Nodes that read a value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.reads):
                found.setdefault(name, []).append(node)
        return found

    def of(self, nodes: list[Node]) -> Graph:
        """The same with other nodes, less those that nobody needs."""
        wanted = set(self.outputs)
        kept = []
        for node in reversed(nodes):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.reads)
        return replace(self, nodes=kept[::-1])


@cache
def _cpu(name: str | None) -> Target:
    return pick_target(name)


def _free(graph: Any, outer: frozenset[str]) -> Iterator[str]:
    """Values that a graph reads of those around it."""
    own = {one.name for one in (*graph.input, *graph.initializer)}
    own |= {one.values.name for one in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in own:
                yield name
        for inner in subgraphs(node):
            yield from (name for name in _free(inner, outer) if name not in own)
        own.update(node.output)
    for one in graph.output:
        if one.name not in own:
            yield one.name


def node_of(proto: Any) -> Node:
    """A node with what its inner graphs read."""
    read = [name for inner in subgraphs(proto) for name in _free(inner, frozenset())]
    return Node(proto, tuple(dict.fromkeys(read)))


def graph_of(model: OnnxModel, reader: TensorReader, target: str | None = None) -> Graph:
    """The main graph of a model, of which inputs have no types yet; its functions are inlined.

    Raises:
        ModelFileError: functions cannot be inlined.
    """
    proto = model.proto
    if proto.functions:
        from onnx.inliner import inline_local_functions

        try:
            proto = inline_local_functions(proto)
        except Exception as error:  # of any kind: it is a native library's
            reason = str(error).strip().partition("\n")[0][:300]
            raise ModelFileError(
                f"its functions cannot be put in place of their calls: {reason}; export it again",
                path=model.path,
            ) from None
    sparse = {one.values.name: one for one in proto.graph.sparse_initializer}
    constants = Constants(model, reader)
    return Graph(
        [node_of(node) for node in proto.graph.node],
        constants,
        [one.name for one in proto.graph.input if one.name not in constants],
        [one.name for one in proto.graph.output],
        model.opsets,
        proto.ir_version,
        sparse=sparse,
        target=target,
        no_tensors={
            one.name: one.type
            for one in proto.graph.input
            if one.type.WhichOneof("value") not in (None, "tensor_type")
        },
    )
