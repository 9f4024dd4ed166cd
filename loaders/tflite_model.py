"""TFLite files (`.tflite`, version 3 of the schema) as validated data: tensors and operators.

Nothing here runs the model, and weights stay in the file. Every index and size that a later reader
uses is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flatbuffers import packer

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders import tflite_schema as schema
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.tflite_wire import MOST_TABLES, FlatFile, Table

VERSION = 3
MOST_DIMENSIONS = 8
MOST_ELEMENTS = 1 << 40
_MOST_SCALES = 1 << 24


@dataclass(frozen=True)
class Quantisation:
    """Of real = (code - zero) * scale.

    Attributes:
        scales: float32, one, or one for each entry of dimension `axis`.
        zeros: int64, as many.
    """

    scales: np.ndarray
    zeros: np.ndarray
    axis: int


@dataclass(frozen=True)
class Tensor:
    """A value or constant.

    Attributes:
        name: its own among all of the model.
        type: of numpy.
        place: of a constant; None: it is made at run time.
        quantisation: None: it has none.
    """

    index: int
    name: str
    type: str
    shape: tuple[int, ...]
    place: TensorInfo | None
    quantisation: Quantisation | None


@dataclass(frozen=True)
class Operator:
    """An operator's use.

    Attributes:
        op: what the schema calls it.
        inputs: indices of tensors; -1: left out.
        options: numbers by field, as `option` reads them.
        path: of the file, for errors.
        begin: where it is in the file.
    """

    index: int
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Table | None
    path: Path
    begin: int

    @property
    def label(self) -> str:
        """For people."""
        return f"operator {self.index} ({self.op})"

    def bad(self, message: str) -> ModelFileError:
        """That the file says something impossible of it."""
        return ModelFileError(
            f"{self.label}: {message}; export or fetch it again", path=self.path, offset=self.begin
        )

    def unsupported(self, message: str) -> UnsupportedError:
        """That this one is not done here."""
        return UnsupportedError(f"{self.label}: {message}", path=self.path, offset=self.begin)

    def byte(self, field: int) -> int:
        """An option of one byte: a choice, or a bool."""
        return 0 if self.options is None else int(self.options.number(field, packer.uint8))

    def whole(self, field: int, default: int = 0) -> int:
        """An option that is a whole number."""
        if self.options is None:
            return default
        return int(self.options.number(field, packer.int32, default))

    def real(self, field: int) -> float:
        """An option that is a number."""
        return 0.0 if self.options is None else float(self.options.number(field, packer.float32))

    def chosen(self, field: int, names: Sequence[str]) -> str:
        """An option that is one of these."""
        value = self.byte(field)
        if value >= len(names):
            raise self.bad(f"option {field} is {value}, and there are {len(names)} choices")
        return names[value]


@dataclass(frozen=True)
class TfliteModel:
    """A model, validated; its operators are in an order in which they can run.

    Attributes:
        file: to be closed when all options have been read.
        inputs, outputs: indices of tensors.
    """

    file: FlatFile
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.file.path


def read_tflite(file: FlatFile) -> TfliteModel:
    """Read and check what a file says, but not what each operator makes of it.

    Raises:
        ModelFileError: it is no TFLite file, or damaged.
        UnsupportedError: it has types of values, or a version, that are not read.
    """
    root = file.root(schema.IDENTIFIER, "TFLite model")
    version = root.number(schema.Model.VERSION, packer.uint32)
    if version != VERSION:
        raise UnsupportedError(
            f"version {version} of the schema; {VERSION} is read: convert the model anew",
            path=file.path,
        )
    buffers = [_buffer(file, one) for one in root.tables(schema.Model.BUFFERS, "buffer")]
    graphs = list(root.tables(schema.Model.SUBGRAPHS, "subgraph"))
    if len(graphs) != 1:
        raise UnsupportedError(
            f"it has {len(graphs)} subgraphs, and one is read: networks with loops or branches are "
            "not", path=file.path,
        )  # fmt: skip
    (graph,) = graphs
    names: set[str] = set()
    tensors = tuple(
        _tensor(file, i, one, buffers, names)
        for i, one in enumerate(graph.tables(schema.Subgraph.TENSORS, "tensor"))
    )
    codes = [_code(one) for one in root.tables(schema.Model.OPERATOR_CODES, "operator code")]
    operators = tuple(
        _operator(file, i, one, codes, len(tensors))
        for i, one in enumerate(graph.tables(schema.Subgraph.OPERATORS, "operator"))
    )
    inputs = _indices(graph, schema.Subgraph.INPUTS, len(tensors), 0)
    outputs = _indices(graph, schema.Subgraph.OUTPUTS, len(tensors), 0)
    model = TfliteModel(file, tensors, operators, inputs, outputs)
    _check_order(model, graph)
    return model


def _buffer(file: FlatFile, one: Table) -> tuple[int, int] | None:
    """Where the data of a buffer is, and how long; None: it has none."""
    offset = one.number(schema.Buffer.OFFSET, packer.uint64)
    size = one.number(schema.Buffer.SIZE, packer.uint64)
    if offset > 1:
        if offset + size > file.size:
            raise file.bad(f"{one.what}: {size} bytes at {offset} are not in the file", one.begin)
        return offset, size
    place = one.place(schema.Buffer.DATA)
    return None if place is None or place[1] == 0 else place


def _code(one: Table) -> str:
    old = one.number(schema.Code.OLD_BUILTIN, packer.int8)
    code = max(old, one.number(schema.Code.BUILTIN, packer.int32))
    if code == schema.CUSTOM:
        return f"custom {one.string(schema.Code.CUSTOM)[:80]!r}"
    return schema.OPERATORS[code] if 0 <= code < len(schema.OPERATORS) else f"number {code}"


def _indices(table: Table, field: int, count: int, least: int) -> tuple[int, ...]:
    found = tuple(table.array(field, "<i4", MOST_TABLES).tolist())
    for index in found:
        if not least <= index < count:
            raise table.file.bad(
                f"{table.what}: tensor {index}, and there are {count}", table.begin
            )
    return found


def _operator(file: FlatFile, index: int, one: Table, codes: Sequence[str], count: int) -> Operator:
    code = one.number(schema.Operator.CODE, packer.uint32)
    if code >= len(codes):
        raise file.bad(f"{one.what}: code {code}, and there are {len(codes)}", one.begin)
    return Operator(
        index, codes[code], _indices(one, schema.Operator.INPUTS, count, -1),
        _indices(one, schema.Operator.OUTPUTS, count, 0),
        one.table(schema.Operator.OPTIONS, f"operator {index} ({codes[code]}): options"),
        file.path, one.begin,
    )  # fmt: skip


def _tensor(
    file: FlatFile, index: int, one: Table, buffers: Sequence[tuple[int, int] | None],
    names: set[str],
) -> Tensor:  # fmt: skip
    name = one.string(schema.Tensor.NAME) or f"tensor {index}"
    if name in names:
        name = f"{name}:{index}"
    names.add(name)

    def bad(message: str) -> ModelFileError:
        return ModelFileError(
            f"{message}; export or fetch it again", path=file.path, tensor=name, offset=one.begin
        )

    def unsupported(message: str) -> UnsupportedError:
        return UnsupportedError(message, path=file.path, tensor=name, offset=one.begin)

    if len(names) != index + 1:
        raise bad("there are two tensors of this name")
    number = one.number(schema.Tensor.TYPE, packer.int8)
    kind = schema.TYPES.get(number)
    if kind is None:
        known = 0 <= number < len(schema.TYPE_NAMES)
        what = schema.TYPE_NAMES[number] if known else f"type {number}"
        raise unsupported(f"its elements are {what}, which is not read from TFLite files")
    shape = tuple(one.array(schema.Tensor.SHAPE, "<i4", MOST_DIMENSIONS).tolist())
    if any(d < 0 for d in shape) or math.prod(shape) > MOST_ELEMENTS:
        raise bad(f"its shape {list(shape)} is not possible")
    if one.number(schema.Tensor.IS_VARIABLE, packer.uint8):
        raise unsupported("it keeps a state between calls, which is not done for TFLite files")
    if one.table(schema.Tensor.SPARSITY, f"{one.what}: sparsity") is not None:
        raise unsupported("it is sparse: convert the model without sparse tensors")
    buffer = one.number(schema.Tensor.BUFFER, packer.uint32)
    if buffer >= max(1, len(buffers)):
        raise bad(f"its data is buffer {buffer}, and there are {len(buffers)}")
    place = None
    if buffer and (data := buffers[buffer]) is not None:
        offset, n_bytes = data
        expected = math.prod(shape) * np.dtype(kind).itemsize
        if n_bytes != expected:
            raise bad(f"its shape {list(shape)} and type {kind} ask for {expected} bytes, and "
                      f"buffer {buffer} has {n_bytes}")  # fmt: skip
        place = TensorInfo(name, kind, shape, file.path, offset, n_bytes)
    quantised = one.table(schema.Tensor.QUANTIZATION, f"{one.what}: quantisation")
    of = None
    if quantised is not None and kind in ("int8", "uint8", "int16"):  # of int32 it is known: biases
        if quantised.number(schema.Quantization.DETAILS_TYPE, packer.uint8):
            raise unsupported("it has a custom quantisation")
        of = _quantisation(quantised, shape, kind, bad)
    return Tensor(index, name, kind, shape, place, of)


def _quantisation(
    one: Table, shape: tuple[int, ...], kind: str, bad: Callable[[str], ModelFileError]
) -> Quantisation | None:
    scales = one.array(schema.Quantization.SCALE, "<f4", _MOST_SCALES)
    if scales.size == 0:
        return None
    zeros = one.array(schema.Quantization.ZERO_POINT, "<i8", _MOST_SCALES)
    if zeros.size == 0:
        zeros = np.zeros(1, np.int64)
    axis = one.number(schema.Quantization.DIMENSION, packer.int32)
    if scales.size == 1:
        axis = 0  # converters leave another here
    elif not 0 <= axis < len(shape) or shape[axis] != scales.size:
        raise bad(f"it has {scales.size} scales for dimension {axis} of {list(shape)}")
    if zeros.size not in (1, scales.size):
        raise bad(f"it has {zeros.size} zero points for {scales.size} scales")
    if not np.isfinite(scales).all() or (scales <= 0).any():
        raise bad("a scale is not a positive number")
    ends = np.iinfo(kind)
    if (zeros < ends.min).any() or (zeros > ends.max).any():
        raise bad(f"a zero point is no {kind}")
    return Quantisation(scales, np.broadcast_to(zeros, scales.size), axis)


def _check_order(model: TfliteModel, graph: Table) -> None:
    """Each tensor is made once, and before it is read."""
    there = {one.index for one in model.tensors if one.place is not None}
    for index in model.inputs:
        if index in there:
            raise graph.file.bad(
                f"the input {model.tensors[index].name!r} is a constant, or there twice",
                graph.begin,
            )
        there.add(index)
    for one in model.operators:
        for index in one.inputs:
            if index >= 0 and index not in there:
                raise one.bad(
                    f"it reads tensor {index} ({model.tensors[index].name!r}), which nothing makes "
                    "before it"
                )
        for index in one.outputs:
            if index in there:
                raise one.bad(f"it makes tensor {index}, which is there already")
            there.add(index)
    for index in model.outputs:
        if index not in there:
            raise graph.file.bad(
                f"the output {model.tensors[index].name!r} is made by nothing", graph.begin
            )
