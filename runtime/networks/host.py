"""Operators that have no kernel of ours: onnxruntime computes them, or else onnx's reference."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrace.errors import HeadraceError, UnsupportedError
from headrace.interruptible import run_aside
from headrace.loaders.onnx_model import subgraphs
from headrace.memory import give_back_heap
from headrace.networks.by_reference import check_reference
from headrace.networks.fatal import check_empty
from headrace.networks.fusions import ends_the_process, kept, left_out
from headrace.networks.graph import Graph, Node, TensorType
from headrace.networks.host_memory import (
    bounded,
    free_bytes,
    is_open,
    ran_out,
    values_bytes,
    weight_bytes,
)

SESSION_BYTES = 250_000  # of a session, beside weights and values
ARENA_BYTES = 1 << 20  # onnxruntime takes for values at a time, and keeps
NARROW = (21, 22, 23, 25, 26)  # elements of less than a byte
_LONG_S = 0.1  # a run that takes longer goes where Ctrl-C can end it
_QUIET = 4  # of onnxruntime's severities: only what is fatal


class HostRegion:
    """A run of nodes as one session of onnxruntime.

    Where onnxruntime refuses them (an operator set that it has not caught up with), the reference
    implementation of the package onnx computes them, slowly.

    Args:
        graph: that has the nodes.
        nodes: in order.
        outputs: values that somebody else wants.
        threads: of the session.
        spins: whether they look for work for a while before they sleep; not where kernels of ours
            want the cores.
        budget: that values of unknown sizes stay below; None: what is free.

    Attributes:
        inputs, outputs: names.
        by_reference: why onnxruntime does not compute them; None: it does.
        memory_bytes: that it takes at most, about.
        is_open: whether there are values whose sizes are not known.

    Raises:
        UnsupportedError: nothing here computes them.
    """

    def __init__(
        self, graph: Graph, nodes: Sequence[Node], outputs: Sequence[str], threads: int,
        spins: bool = True, budget: int | None = None,
    ) -> None:  # fmt: skip
        self.nodes = list(nodes)
        self.outputs = list(outputs)
        made = {name for node in nodes for name in node.outputs}
        read = dict.fromkeys(name for node in nodes for name in node.reads if name not in made)
        here = [name for name in read if name in graph.constants]
        self.inputs = [
            name for name in read if name not in graph.constants and name not in graph.sparse
        ]
        weights = weight_bytes(graph, self.nodes)
        values = values_bytes(graph, self.nodes, self.inputs, outputs)
        self._few = not spins and values <= ARENA_BYTES  # little is taken anew for each run
        self.memory_bytes = SESSION_BYTES + weights + values + (0 if self._few else ARENA_BYTES)
        self.by_reference: str | None = None
        self._session: Any = None
        self._plain = True
        self._reference: Any = None
        self._budget, self.is_open = budget, is_open(graph, self.nodes)
        self._seconds = math.inf  # that the last run took, where all take about as long
        self._loops = any(True for node in self.nodes for _ in subgraphs(node.proto))
        types: Mapping[str, TensorType] = graph.types
        proto = self._model(graph, here, types)
        try:
            check_empty(graph, self.nodes, outputs)
            failed: Exception | None = None
            # It checks branches of `If` that are never taken too, and known shapes may not fit; or
            # it fails in its own fusions.
            for known, optimised in ((True, True), (False, True), (False, False)):
                if not known:
                    types = _without_shapes(graph.types)
                    proto = self._model(graph, here, types)
                try:
                    self._session = self._open(graph, proto, here, threads, spins, optimised)
                    break
                except Exception as error:
                    failed = error.with_traceback(None)  # which has its weights
            else:
                assert failed is not None
                raise failed
            self._given = graph, types, here, threads, spins
            self._plain = self._is_plain()
        except Exception as error:  # of any kind: it is a native library's
            self.by_reference = _first_line(error)
            for node in self.nodes:
                check_reference(graph, node, self.by_reference)
            self._reference = self._evaluator(graph, proto, here)

    def _model(
        self, graph: Graph, constants: Sequence[str], types: Mapping[str, TensorType]
    ) -> Any:
        import onnx

        proto = onnx.ModelProto(ir_version=graph.ir_version)
        for domain, version in graph.opsets.items():
            proto.opset_import.add(domain=domain, version=version)
        proto.graph.name = "region"
        proto.graph.node.extend(node.proto for node in self.nodes)
        for name in self.inputs:
            one = proto.graph.input.add()
            one.CopyFrom(value_info(name, types.get(name)))
            if name in graph.no_tensors:
                one.type.CopyFrom(graph.no_tensors[name])
        for name in self.outputs:
            proto.graph.output.append(value_info(name, None))
        for name, copy in kept(graph, self.nodes, self.outputs):
            proto.graph.node.add(op_type="Sum", input=[name], output=[copy])
            proto.graph.output.append(value_info(copy, None))
        read = {name for node in self.nodes for name in node.reads}
        proto.graph.sparse_initializer.extend(
            one for name, one in graph.sparse.items() if name in read
        )
        for name in constants:
            of = graph.constants.type(name)
            if graph.constants.is_small(name):
                proto.graph.initializer.append(graph.constants.tensor(name))
                continue
            tensor = proto.graph.initializer.add(
                name=name, data_type=of.elem_type, dims=of.shape or ()
            )
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="memory")
        return proto

    def _open(
        self, graph: Graph, proto: Any, constants: Sequence[str], threads: int, spins: bool,
        optimised: bool = True,
    ) -> Any:  # fmt: skip
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if not optimised or ends_the_process(graph, self.nodes):
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _QUIET
        options.enable_cpu_mem_arena = not self._few
        # Files that say nothing of it want no activations of 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if not spins:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        most = (self._budget or free_bytes()) if self.is_open else None
        large = [name for name in constants if not graph.constants.is_small(name)]
        if large:  # the session has its own of these
            values = [self._value(graph, name) for name in large]
            options.add_external_initializers(large, values)
        with bounded(options, most):
            session = onnxruntime.InferenceSession(
                proto.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it prints what went wrong
                disabled_optimizers=left_out(graph, self.nodes),
            )
        if large:
            del options, values
            give_back_heap()
        return session

    def _unoptimised(self) -> Any:
        graph, types, constants, threads, spins = self._given
        proto = self._model(graph, constants, types)
        return self._open(graph, proto, constants, threads, spins, False)

    @staticmethod
    def _value(graph: Graph, name: str) -> Any:
        import onnxruntime

        array = graph.constants.array(name)
        elem_type = graph.constants.type(name).elem_type
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, elem_type)

    def _evaluator(self, graph: Graph, proto: Any, constants: Sequence[str]) -> Any:
        import onnx
        from onnx.reference import ReferenceEvaluator

        del proto.graph.initializer[:]
        proto.graph.initializer.extend(graph.constants.tensor(name) for name in constants)
        for one in (*proto.graph.input, *proto.graph.output):
            if not one.HasField("type"):
                one.type.CopyFrom(onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor()))
        try:
            return ReferenceEvaluator(proto)
        except Exception as error:
            labels = ", ".join(node.label for node in self.nodes[:3])
            raise UnsupportedError(
                f"nothing here runs {labels}: onnxruntime says {self.by_reference}, and onnx "
                f"itself {_first_line(error)}"
            ) from error

    def _is_plain(self) -> bool:
        """Whether all that goes in and out are types that numpy has.

        Raises:
            UnsupportedError: elements of less than a byte, which onnxruntime does not hand over.
        """
        import onnx

        plain = True
        for one in (*self._session.get_inputs(), *self._session.get_outputs()):
            elem_type = _element(one.type)
            if elem_type in NARROW:
                self._session = None
                raise UnsupportedError(f"{one.type} goes in or out")
            if elem_type is not None and elem_type != onnx.TensorProto.STRING:
                plain &= not _is_added(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
        return plain

    def types(self) -> dict[str, TensorType]:
        """What is known of the outputs; of those that are no tensors nothing."""
        if self._session is None:
            return {}
        found = {}
        for one in self._session.get_outputs():
            elem_type = _element(one.type)
            if elem_type is not None:
                known = all(isinstance(d, int) for d in one.shape)
                found[one.name] = TensorType(elem_type, tuple(one.shape) if known else None)
        return found

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs for inputs: arrays, or lists of them where the values are sequences.

        Raises:
            HeadraceError: an operator refuses its inputs, or values of unknown sizes become larger
                than there may be.
        """
        feeds = {name: values[name] for name in self.inputs}
        try:
            if self._session is not None:
                found = self._run_either(feeds)
            else:
                found = self._reference.run(self.outputs, feeds)
        except Exception as error:
            labels = ", ".join(node.label for node in self.nodes[:3])
            more = f" and {len(self.nodes) - 3} more" if len(self.nodes) > 3 else ""
            if ran_out(error):
                raise HeadraceError(
                    f"{labels}{more}: values become larger than what is free, or `memory` allows: "
                    "give the network smaller inputs, or allow more"
                ) from None
            raise HeadraceError(f"{labels}{more}: {_first_line(error)}") from error
        return dict(zip(self.outputs, found, strict=True))

    def _run_either(self, feeds: dict[str, Any]) -> Sequence[Any]:
        """As optimised or, where moved transposes make that fail, as the file has it."""
        try:
            return self._run_session(feeds)
        except Exception:
            if not any(node.op == "Transpose" for node in self.nodes):
                raise
            optimised = self._session
            try:
                self._session = self._unoptimised()
                return self._run_session(feeds)
            except Exception:
                self._session = optimised
                raise

    def _run_session(self, feeds: dict[str, Any]) -> Sequence[Any]:
        import onnxruntime

        began, options = time.perf_counter(), onnxruntime.RunOptions()
        if self.is_open:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and (self._loops or self._seconds > _LONG_S):
            found = run_aside(
                lambda: self._run_with(options, feeds),
                on_interrupt=lambda: setattr(options, "terminate", True),
            )
        else:
            found = self._run_with(options, feeds)
        self._seconds = time.perf_counter() - began
        return found

    def _run_with(self, options: Any, feeds: dict[str, Any]) -> Sequence[Any]:
        import onnxruntime

        if self._plain and all(_is_plain(value) for value in feeds.values()):
            found: Sequence[Any] = self._session.run(self.outputs, feeds, options)
            return found
        elements = {one.name: _element(one.type) for one in self._session.get_inputs()}
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, elements[name])
            for name, value in feeds.items()
        }
        made = self._session.run_with_ort_values(self.outputs, values, options)
        return [_array(one) for one in made]


def _without_shapes(types: Mapping[str, TensorType]) -> dict[str, TensorType]:
    return {name: TensorType(of.elem_type) for name, of in types.items()}


def _is_plain(value: Any) -> bool:
    """Whether onnxruntime takes it as numpy has it."""
    return not isinstance(value, np.ndarray) or not _is_added(value.dtype)


def _is_added(dtype: np.dtype[Any]) -> bool:
    """Whether ml_dtypes has added a type to numpy: onnxruntime does not take it for what it is."""
    return dtype.isbuiltin == 2


def _element(text: str) -> int | None:
    """Type of the elements of what onnxruntime calls so."""
    return _ELEMENTS.get(text.removeprefix("tensor(").removesuffix(")"))


def _array(value: Any) -> Any:
    """A value of onnxruntime as an array of our own."""
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.element_type())
    if not _is_added(dtype):
        return value.numpy()
    shape = tuple(value.shape())
    n_bytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(ctypes.string_at(value.data_ptr(), n_bytes), dtype).reshape(shape)


_ELEMENTS = {
    "float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7,
    "string": 8, "bool": 9, "float16": 10, "double": 11, "uint32": 12, "uint64": 13,
    "complex64": 14, "complex128": 15, "bfloat16": 16, "float8e4m3fn": 17, "float8e4m3fnuz": 18,
    "float8e5m2": 19, "float8e5m2fnuz": 20, "uint4": 21, "int4": 22, "float4e2m1": 23,
    "float8e8m0": 24, "uint2": 25, "int2": 26,
}  # fmt: skip


def value_info(name: str, of: TensorType | None) -> Any:
    """An input or output of a graph; without a type where none is known."""
    import onnx

    if of is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, of.elem_type, of.shape)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
