"""ONNX files (onnx.ai, `onnx.proto`) as validated data: a graph, and where its weights are.

Nothing here runs the model, and no weight is read before `OnnxModel.constant` is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.onnx_external import external_place
from headrace.loaders.onnx_functions import check_functions
from headrace.loaders.onnx_inner import bring_in
from headrace.loaders.onnx_windows import check_windows
from headrace.loaders.onnx_wire import Place, without_weights
from headrace.loaders.reader import TensorReader

MOST_ELEMENTS = 1 << 48
MOST_DIMENSIONS = 64
_RAW, _FLOATS, _DOUBLES = 9, 4, 10
_OF_FIELD = {_FLOATS: onnx.TensorProto.FLOAT, _DOUBLES: onnx.TensorProto.DOUBLE}
_BITS: dict[int, int] = {
    onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.FLOAT4E2M1: 4,
    onnx.TensorProto.INT2: 2, onnx.TensorProto.UINT2: 2,
}  # fmt: skip
CONTRIBUTED = ("com.microsoft", "com.microsoft.nchwc")  # what onnxruntime adds


def type_name(elem_type: int) -> str:
    """What ONNX calls a type of elements."""
    try:
        return str(onnx.TensorProto.DataType.Name(elem_type))
    except ValueError:
        return f"type {elem_type}"


def tensor_bytes(elem_type: int, shape: Iterable[int]) -> int:
    """Bytes of a tensor in a file; types below a byte are packed."""
    count = math.prod(shape)
    if elem_type in _BITS:
        return -(-count * _BITS[elem_type] // 8)
    return count * onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize


@dataclass(frozen=True)
class OnnxModel:
    """A model, validated.

    Attributes:
        path: of the file; None: it came as bytes.
        proto: ModelProto whose large initialisers are not in it.
        weights: where these are, by name, with the ONNX type of their elements.
        inline: initialisers that are in the proto.
        graph_bytes: of the proto.
    """

    path: Path | None
    proto: Any
    weights: dict[str, tuple[TensorInfo, int]] = field(default_factory=dict)
    inline: dict[str, Any] = field(default_factory=dict)
    graph_bytes: int = 0

    @property
    def opsets(self) -> dict[str, int]:
        """Versions of operator sets by domain; "" is ai.onnx."""
        return {
            "" if one.domain == "ai.onnx" else one.domain: one.version
            for one in self.proto.opset_import
        }

    @property
    def files(self) -> list[Path]:
        """That it is read from: its own, and those that its initialisers are in."""
        own = [] if self.path is None else [self.path.resolve()]
        return sorted({*own, *(info.path.resolve() for info, _ in self.weights.values())})

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initialisers."""
        of_inline = (tensor_bytes(t.data_type, t.dims) for t in self.inline.values()
                     if t.data_type != onnx.TensorProto.STRING)  # fmt: skip
        return sum(info.n_bytes for info, _ in self.weights.values()) + sum(of_inline)

    def shape_and_type(self, name: str) -> tuple[tuple[int, ...], int]:
        """Of an initialiser; KeyError: there is none of this name."""
        if name in self.weights:
            info, elem_type = self.weights[name]
            return info.shape, elem_type
        tensor = self.inline[name]
        return tuple(tensor.dims), tensor.data_type

    def constant(self, name: str, reader: TensorReader) -> Any:
        """An initialiser as a TensorProto with its data, read from its file where it is not here.

        Raises:
            ModelFileError: the file shrank, or the disk failed.
        """
        if name in self.inline:
            return self.inline[name]
        info, elem_type = self.weights[name]
        raw = bytearray(info.n_bytes)
        reader.readinto(info, 0, raw)
        tensor = onnx.TensorProto(name=name, data_type=elem_type, dims=info.shape)
        tensor.raw_data = bytes(raw)
        return tensor

    def array(self, name: str, reader: TensorReader) -> np.ndarray:
        """An initialiser as an array.

        Raises:
            ModelFileError: the file shrank, or the disk failed.
        """
        if name in self.weights:
            info, elem_type = self.weights[name]
            if elem_type not in _BITS:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
                found = np.empty(info.shape, dtype)
                reader.readinto(info, 0, found.reshape(-1).view(np.uint8))
                return found
        array: np.ndarray = onnx.numpy_helper.to_array(self.constant(name, reader))
        return array

    def rows(
        self, name: str, reader: TensorReader, n_bytes: int, together: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """An initialiser in runs of entries of its first dimension, with the first one's number.

        Args:
            n_bytes: of a run, about; of what is no tensor of a file there is one run.
            together: runs begin at multiples of so many.

        Raises:
            ModelFileError: the file shrank, or the disk failed.
        """
        info, elem_type = self.weights.get(name, (None, 0))
        if info is None or elem_type in _BITS or not info.shape or not info.n_bytes:
            yield 0, self.array(name, reader)
            return
        dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
        count, row_bytes = info.shape[0], info.n_bytes // info.shape[0]
        step = max(1, n_bytes // (row_bytes * together)) * together
        for first in range(0, count, step):
            found = np.empty((min(step, count - first), *info.shape[1:]), dtype)
            reader.readinto(info, first * row_bytes, found.reshape(-1).view(np.uint8))
            yield first, found


def open_onnx(path: Path) -> OnnxModel:
    """Read and check the header of an ONNX file.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFileError: it is no ONNX file, damaged, or leads out of its directory.
        UnsupportedError: its operator sets are too old or unknown.
    """
    stripped, places = without_weights(path)
    return _checked(path, _parsed(path, stripped), places, len(stripped))


def from_proto(proto: Any) -> OnnxModel:
    """Check a ModelProto that is in memory; external data it may not have.

    Raises:
        ModelFileError, UnsupportedError: as `open_onnx`.
    """
    return _checked(None, proto, {}, proto.ByteSize())


def _parsed(path: Path, stripped: bytes) -> Any:
    try:
        return onnx.ModelProto.FromString(stripped)
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"no ONNX model: {error}; export or fetch it again", path=path
        ) from None


def _checked(path: Path | None, proto: Any, places: dict[str, Place], n_bytes: int) -> OnnxModel:
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelFileError(
            "no ONNX model: it has no graph or says no operator set; export or fetch it again",
            path=path,
        )
    _check_text(path, proto)
    _check_opsets(path, proto)
    check_functions(path, proto)
    weights: dict[str, tuple[TensorInfo, int]] = {}
    inline: dict[str, Any] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in weights or tensor.name in inline:
            raise ModelFileError("there are two initialisers of this name", path=path,
                                 tensor=tensor.name)  # fmt: skip
        place = _place(path, tensor, places.get(tensor.name))
        if place is None:
            inline[tensor.name] = tensor
        else:
            weights[tensor.name] = place
    model = OnnxModel(path, _without_initializers(proto), weights, inline, n_bytes)
    _check_graph(path, proto.graph, {*weights, *inline}, set())
    for function in proto.functions:
        _check_order(path, function.node, set(function.input), set(), function.output)

    def shape_of(name: str) -> tuple[int, ...] | None:
        return model.shape_and_type(name)[0] if name in weights or name in inline else None

    for owner, nodes in ((proto, _nodes(proto.graph)), *((f, f.node) for f in proto.functions)):
        versions = {one.domain: one.version for one in owner.opset_import}
        for node in nodes:
            _check_form(path, node, versions)
    for node in _nodes(proto.graph):
        check_windows(path, node, shape_of)
    bring_in(path, model.proto, lambda tensor: _beside(path, tensor))
    return model


def _without_initializers(proto: Any) -> Any:
    """A copy that shares nothing; the given one stays as it is."""
    found = onnx.ModelProto()
    _copy_but(proto, found, "graph")
    _copy_but(proto.graph, found.graph, "initializer")
    return found


def _copy_but(source: Any, to: Any, left_out: str) -> None:
    for field_, value in source.ListFields():
        if field_.name == left_out:
            continue
        of = getattr(to, field_.name)
        if hasattr(of, "MergeFrom"):
            of.MergeFrom(value)
        else:
            setattr(to, field_.name, value)


def _check_text(path: Path | None, proto: Any) -> None:
    """Text must be UTF-8: for what is not, protobuf gives bytes to whoever reads it."""
    left = [proto]
    while left:
        for field_, value in left.pop().ListFields():
            repeated = not isinstance(value, (str, bytes)) and hasattr(value, "__getitem__")
            values = value if repeated else [value]
            if field_.message_type is not None:
                left += values
            elif field_.type == field_.TYPE_STRING and any(isinstance(v, bytes) for v in values):
                raise ModelFileError(
                    f"damaged: {field_.full_name} is no UTF-8 text; export or fetch it again",
                    path=path,
                )


def _check_opsets(path: Path | None, proto: Any) -> None:
    newest = onnx.defs.onnx_opset_version()
    for one in proto.opset_import:
        if one.domain in ("", "ai.onnx") and not 1 <= one.version <= newest:
            raise UnsupportedError(
                f"its operator set is {one.version}, and 1 to {newest} are read: update the "
                "package onnx, or export the model for an older one",
                path=path,
            )
    known = {schema.domain for schema in onnx.defs.get_all_schemas()}
    known |= {"", "ai.onnx", *CONTRIBUTED, *(f.domain for f in proto.functions)}
    foreign = sorted({node.domain for node in _nodes(proto.graph)} - known)
    if foreign:
        raise UnsupportedError(
            f"it has operators of {foreign[0][:80]!r}, which nothing here runs; known are "
            f"{', '.join(sorted(known - {''}))}",
            path=path,
        )


def _check_form(path: Path | None, node: Any, versions: Mapping[str, int]) -> None:
    """Inputs that an operator needs are there (onnxruntime 1.32 ends the process otherwise), and
    attributes are of its types.
    """
    if node.domain not in ("", "ai.onnx"):
        return
    form = _form(node.op_type, versions.get("", versions.get("ai.onnx", 1)))
    if form is None:  # the host says so
        return
    optional, types = form
    label = f"node {node.name or list(node.output[:1])} ({node.op_type})"
    for i, name in enumerate(node.input):
        if not name and optional and not optional[min(i, len(optional) - 1)]:
            raise ModelFileError(
                f"{label} lacks its input {i}, which this operator needs; export it again",
                path=path,
            )
    for one in node.attribute:
        wanted = types.get(one.name, one.type)
        if one.type not in (0, wanted) and not one.ref_attr_name:  # 0: of files that say nothing
            kinds = [onnx.AttributeProto.AttributeType.Name(kind) for kind in (one.type, wanted)]
            raise ModelFileError(
                f"{label} has {one.name} of the type {kinds[0]}, and it is {kinds[1]}; export it "
                "again",
                path=path,
            )


@cache
def _form(op: str, version: int) -> tuple[list[bool], dict[str, int]] | None:
    """Which inputs may be left out, and types of attributes; None: there is no such operator."""
    try:
        schema: Any = onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return None
    left_out = onnx.defs.OpSchema.FormalParameterOption.Optional
    types = {name: int(one.type.value) for name, one in schema.attributes.items()}
    return [one.option == left_out for one in schema.inputs], types


def subgraphs(node: Any) -> Iterator[Any]:
    """The graphs that a node's attributes have."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)


def _place(path: Path | None, tensor: Any, place: Place | None) -> tuple[TensorInfo, int] | None:
    """Where the data of an initialiser is; None: in the tensor itself."""

    def bad(message: str, offset: int | None = None) -> ModelFileError:
        return ModelFileError(message, path=path, tensor=tensor.name, offset=offset)

    shape = tuple(tensor.dims)
    if len(shape) > MOST_DIMENSIONS or any(d < 0 for d in shape):
        raise bad(f"its shape {list(shape[:8])} is not possible")
    if math.prod(shape) > MOST_ELEMENTS:
        raise bad(f"its shape {list(shape[:8])} has more elements than any memory")
    if tensor.data_type == onnx.TensorProto.STRING:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise bad("strings in another file, which the format does not have")
        return None
    try:
        expected = tensor_bytes(tensor.data_type, shape)
    except (KeyError, TypeError):
        raise bad(f"its elements are of {type_name(tensor.data_type)}, which is unknown") from None
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if path is None:
            raise bad("its data is in another file, and the model is not: give the model's path")
        file, offset = external_place(path, tensor, expected)
        name = type_name(tensor.data_type)
        return TensorInfo(tensor.name, name, shape, file, offset, expected), tensor.data_type
    if place is None:
        if tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
            raise bad(f"it has {len(tensor.raw_data)} bytes, and its shape and type ask for "
                      f"{expected}")  # fmt: skip
        _check_values(tensor, math.prod(shape), bad)
        return None
    of_field = place.field == _RAW or _OF_FIELD.get(place.field) == tensor.data_type
    if place.n_bytes != expected or not of_field:
        raise bad(
            f"it has {place.n_bytes} bytes, and its shape {list(shape)} and type "
            f"{type_name(tensor.data_type)} ask for {expected}; export or fetch it again",
            place.offset,
        )
    assert path is not None
    name = type_name(tensor.data_type)
    return TensorInfo(tensor.name, name, shape, path, place.offset, expected), tensor.data_type


def _beside(path: Path | None, tensor: Any) -> TensorInfo:
    """Where the data of a tensor is that is in another file."""
    place = _place(path, tensor, None)
    assert place is not None  # others are in the tensor itself
    return place[0]


def _check_values(tensor: Any, count: int, bad: Any) -> None:
    """Data in typed fields has an element for each of the shape (halves for complex ones)."""
    if tensor.HasField("raw_data"):
        return
    try:
        found = onnx.numpy_helper.to_array(tensor).size
    except Exception as error:  # whatever the library says of what does not fit
        raise bad(f"its data does not fit its shape and type: {error}") from None
    if found != count:
        raise bad(f"it has {found} elements, and its shape asks for {count}")


def _check_graph(path: Path | None, graph: Any, constants: set[str], outer: set[str]) -> None:
    own = {*constants, *(one.name for one in graph.input)}
    own |= {one.name for one in graph.initializer}
    own |= {one.values.name for one in graph.sparse_initializer}
    _check_order(path, graph.node, own, outer, [one.name for one in graph.output])


def _check_order(
    path: Path | None, nodes: Any, own: set[str], outer: set[str], outputs: Iterable[str]
) -> None:
    """Each name is written once and before it is read: nothing goes in a circle.

    Args:
        own: names that are there before the nodes; theirs are added.
        outer: those of graphs around them.
    """

    def bad(message: str) -> ModelFileError:
        return ModelFileError(message, path=path)

    made_later = {name for node in nodes for name in node.output if name}
    for node in nodes:
        label = f"node {node.name or node.output[:1]} ({node.op_type})"
        for name in filter(None, node.input):
            if name not in own and name not in outer:
                if name in made_later:
                    raise bad(
                        f"{label} reads {name!r}, which a later node makes: the graph goes in a "
                        "circle, or is not in order"
                    )
                raise bad(
                    f"{label} reads {name!r}, which nothing makes: an initialiser or an input is "
                    "missing"
                )
        for inner in subgraphs(node):
            _check_graph(path, inner, set(), own | outer)
        for name in filter(None, node.output):
            if name in own:
                raise bad(f"{label} makes {name!r}, which is there already")
            own.add(name)
    for name in outputs:
        if name not in own and name not in outer:
            raise bad(f"the output {name!r} is made by nothing")
