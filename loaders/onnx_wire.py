"""An ONNX file without the bytes of its weights, and where those are: they are read in place.

The file is a protobuf message (`onnx.proto`, ModelProto); its wire format is read here only as far
as the initialisers of the main graph, whose raw bytes are left out of what is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from headrace.errors import ModelFileError
from headrace.loaders.reader import open_regular

IN_PLACE_BYTES = 1024  # tensors below are parsed with the rest
MOST_HEADER_BYTES = 1 << 30  # of what is parsed; protobuf itself stops at 2 GiB
_GRAPH, _INITIALIZER = 7, 5  # fields of ModelProto and of GraphProto
_NAME, _FLOATS, _RAW, _DOUBLES = 8, 4, 9, 10  # fields of TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_DATA = (_FLOATS, _RAW, _DOUBLES)


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a tensor in the file; `field` of TensorProto has them."""

    offset: int
    n_bytes: int
    field: int


@dataclass(frozen=True, slots=True)
class _Field:
    number: int
    wire: int
    begin: int  # of the tag
    value: int
    end: int


class _Wire:
    """Fields of messages in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = BufferedReader(open_regular(path), 1 << 16)
        self.size = self._file.seek(0, 2)
        self._header = 0

    def close(self) -> None:
        self._file.close()

    def bad(self, message: str, offset: int) -> ModelFileError:
        return ModelFileError(
            f"{message}: this is no ONNX file, or it is damaged; export or fetch it again",
            path=self.path, offset=offset,
        )  # fmt: skip

    def _varint(self, end: int) -> int:
        begin = self._file.tell()
        value = 0
        for shift in range(0, 70, 7):
            if begin + shift // 7 >= end:
                break
            byte = self._file.read(1)
            if not byte:
                break
            value |= (byte[0] & 127) << shift
            if byte[0] < 128:
                return value
        raise self.bad("a number does not end", begin)

    def fields(self, begin: int, end: int) -> Iterator[_Field]:
        """The fields of the message in these bytes."""
        at = begin
        while at < end:
            self._file.seek(at)
            tag = self._varint(end)
            wire, number = tag & 7, tag >> 3
            if wire == _BYTES:
                n_bytes = self._varint(end)
                value = self._file.tell()
            else:
                value = self._file.tell()
                if wire == _VARINT:
                    self._varint(end)
                    n_bytes = self._file.tell() - value
                elif wire in (_FIXED32, _FIXED64):
                    n_bytes = 4 if wire == _FIXED32 else 8
                else:
                    raise self.bad(f"a field has wire type {wire}", at)
            if number == 0 or n_bytes > end - value:
                raise self.bad(
                    f"field {number} of {n_bytes} bytes does not fit into the {end - value} that "
                    "are left", at,
                )  # fmt: skip
            yield _Field(number, wire, at, value, value + n_bytes)
            at = value + n_bytes

    def copy(self, begin: int, end: int) -> bytes:
        """Bytes that are parsed."""
        self._header += end - begin
        if self._header > MOST_HEADER_BYTES:
            raise self.bad(f"more than {MOST_HEADER_BYTES} bytes besides weights", begin)
        self._file.seek(begin)
        found = self._file.read(end - begin)
        if len(found) < end - begin:
            raise self.bad(f"the file ends {end - begin - len(found)} bytes early", begin)
        return found


def _number(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _message(number: int, content: bytes) -> bytes:
    return _number(number << 3 | _BYTES) + _number(len(content)) + content


def _tensor(wire: _Wire, of: _Field, places: dict[str, Place]) -> bytes:
    """A tensor without its bytes, if there are many; their place goes to `places`."""
    data: list[_Field] = []
    rest = b""
    name = ""
    for field in wire.fields(of.value, of.end):
        if field.number in _DATA and field.wire == _BYTES:
            data.append(field)
            continue
        copied = wire.copy(field.begin, field.end)
        if field.number == _NAME and field.wire == _BYTES:
            name = copied[field.value - field.begin :].decode("utf-8", "replace")
        rest += copied
    if len(data) == 1 and data[0].end - data[0].value >= IN_PLACE_BYTES and name not in places:
        (only,) = data
        places[name] = Place(only.value, only.end - only.value, only.number)
    else:
        rest += b"".join(wire.copy(field.begin, field.end) for field in data)
    return rest


def without_weights(path: Path) -> tuple[bytes, dict[str, Place]]:
    """A ModelProto whose large initialisers have no data, and where theirs is, by name.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFileError: it is no regular file, or no protobuf message.
    """
    wire = _Wire(path)
    places: dict[str, Place] = {}
    try:
        parts = []
        for field in wire.fields(0, wire.size):
            if field.number != _GRAPH or field.wire != _BYTES:
                parts.append(wire.copy(field.begin, field.end))
                continue
            graph = []
            for inner in wire.fields(field.value, field.end):
                if inner.number == _INITIALIZER and inner.wire == _BYTES:
                    graph.append(_message(_INITIALIZER, _tensor(wire, inner, places)))
                else:
                    graph.append(wire.copy(inner.begin, inner.end))
            parts.append(_message(_GRAPH, b"".join(graph)))
        return b"".join(parts), places
    finally:
        wire.close()
