"""A network in float32 as quantisation wants it, and runs of it that show what is in between."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from headrace.errors import UnsupportedError
from headrace.networks.compression.samples import Sample
from headrace.networks.graph import node_of

_QUIET = 4  # of onnxruntime's severities: only what is fatal
_LEAST_OPSET = 13  # scales for each channel
_LEAST_IR = 4  # initialisers need not be inputs


def simplified(model: Any) -> Any:
    """The model with constants computed and batch normalisation in the weights of convolutions.

    Initialisers that are inputs as well, whose values callers may replace, are constants there.

    Raises:
        UnsupportedError: onnxruntime does not run it.
    """
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    if version < _LEAST_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, _LEAST_OPSET)
        except Exception as error:  # of any kind: it is a native library's
            raise UnsupportedError(
                f"its operator set {version} does not become {_LEAST_OPSET}, which has scales for "
                f"each channel: {_first_line(error)}; export the model for that one"
            ) from None
    constants = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, _LEAST_IR)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "simplified.onnx")
        _session(model, options)
        found = onnx.load(options.optimized_model_filepath)
    for one in found.graph.sparse_initializer:
        found.graph.initializer.append(_dense(one))
    del found.graph.sparse_initializer[:]
    for one in (*found.graph.node, *found.opset_import):
        if one.domain == "ai.onnx":  # another name of the same, of which onnx knows one
            one.domain = ""
    return onnx.shape_inference.infer_shapes(found)


def _dense(tensor: Any) -> Any:
    """A sparse initialiser as others are."""
    values = onnx.numpy_helper.to_array(tensor.values)
    places = onnx.numpy_helper.to_array(tensor.indices)
    dense = np.zeros(tuple(tensor.dims), values.dtype)
    at = (places,) if places.ndim == 1 else (np.ravel_multi_index(tuple(places.T), dense.shape),)
    dense.reshape(-1)[at] = values
    return onnx.numpy_helper.from_array(dense, tensor.values.name)


def observe(
    model: Any, names: Iterable[str], samples: Sequence[Sample],
    look: Callable[[dict[str, np.ndarray]], None],
) -> None:  # fmt: skip
    """Run a model, without optimisations, and show values of these names of each run.

    Raises:
        UnsupportedError: onnxruntime does not run it.
    """
    wanted = list(dict.fromkeys(names))
    inputs = {one.name for one in model.graph.input}
    outputs = [name for name in wanted if name not in inputs]
    session = None
    if outputs:
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        session = _plain_session(shown, outputs)
    for sample in samples:
        found = [] if session is None else session.run(outputs, sample)
        values = dict(zip(outputs, found, strict=True))
        look(values | {name: sample[name] for name in wanted if name in inputs})


def check(model: Any) -> None:
    """See that onnxruntime takes a model that was made.

    Raises:
        UnsupportedError: it does not.
    """
    _plain_session(model, None)


class Stepwise:
    """A run of a model for several inputs, from value to value.

    Args:
        model: whose nodes are in order.
        samples: its inputs.

    Attributes:
        values: that are still needed, of each input; they may be changed.
    """

    def __init__(self, model: Any, samples: Sequence[Sample]) -> None:
        self._model = model
        self._nodes = list(model.graph.node)
        self._constants = {one.name: one for one in model.graph.initializer}
        self._at = 0
        self._reads = [node_of(node).reads for node in self._nodes]
        self._last_use = {name: i for i, read in enumerate(self._reads) for name in read}
        self.values: list[Sample] = [dict(sample) for sample in samples]

    def run_to(self, name: str) -> None:
        """Compute all up to the node that makes a value, which is not yet computed.

        Raises:
            UnsupportedError: onnxruntime does not run it.
        """
        ends = (i for i in range(self._at, len(self._nodes)) if name in self._nodes[i].output)
        begin, self._at = self._at, next(ends) + 1
        nodes = self._nodes[begin : self._at]
        read = {one for of in self._reads[begin : self._at] for one in of}
        made = [one for node in nodes for one in node.output if one]
        kept = [one for one in made if one == name or self._last_use.get(one, -1) >= self._at]
        piece = onnx.ModelProto(ir_version=self._model.ir_version)
        piece.opset_import.extend(self._model.opset_import)
        piece.graph.name = "piece"
        piece.graph.node.extend(nodes)
        piece.graph.initializer.extend(v for n, v in self._constants.items() if n in read)
        first = self.values[0] if self.values else {}
        given = [one for one in first if one in read]
        for one in given:
            if not isinstance(first[one], np.ndarray):
                raise UnsupportedError(f"{one} is no tensor: no inputs go through this network")
        piece.graph.input.extend(
            onnx.helper.make_tensor_value_info(
                one, onnx.helper.np_dtype_to_tensor_dtype(first[one].dtype), None
            )
            for one in given
        )
        session = _plain_session(piece, kept)
        for values in self.values:
            found = session.run(kept, {one: values[one] for one in given})
            for one in [n for n in values if self._last_use.get(n, -1) < self._at]:
                del values[one]
            values.update(zip(kept, found, strict=True))


def _plain_session(model: Any, outputs: Sequence[str] | None) -> Any:
    """A session of a model, which is changed to give these values, without optimisations."""
    if outputs is not None:
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _session(model, options)


def _session(model: Any, options: Any) -> Any:
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # it prints what went wrong
        )
    except Exception as error:  # of any kind: it is a native library's
        raise UnsupportedError(
            f"onnxruntime does not run this network: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
