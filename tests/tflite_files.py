"""TFLite files for tests, written with FlatBuffers' builder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

from headrace.loaders.tflite_schema import OPERATORS, TYPES

_TYPES = {name: number for number, name in TYPES.items()}
SAME, VALID = 0, 1
NONE, RELU, RELU6 = 0, 1, 3
_SETTERS = {"b": "PrependInt8Slot", "i": "PrependInt32Slot", "f": "PrependFloat32Slot"}


# Of the union BuiltinOptions; the interpreter wants to know, this project's loader does not.
_OPTIONS = {
    "CONV_2D": 1, "DEPTHWISE_CONV_2D": 2, "AVERAGE_POOL_2D": 5, "MAX_POOL_2D": 5, "SOFTMAX": 9,
    "FULLY_CONNECTED": 8, "CONCATENATION": 10, "ADD": 11, "RESHAPE": 17, "MUL": 21, "MEAN": 27,
    "SUB": 28, "STRIDED_SLICE": 32, "LEAKY_RELU": 75, "PAD": 22, "TRANSPOSE": 26, "DEQUANTIZE": 38,
    "QUANTIZE": 89,
}  # fmt: skip


@dataclass
class TfliteFile:
    """A model as it is put together; tensors are known by their indices.

    Attributes:
        copies: of the first tensor, behind all: they refer to its bytes.
    """

    tensors: list[dict[str, Any]] = field(default_factory=list)
    operators: list[dict[str, Any]] = field(default_factory=list)
    copies: int = 0

    def tensor(
        self, shape: Any, dtype: str = "float32", *, data: Any = None, scale: Any = None,
        zero: Any = 0, axis: int = 0, name: str | None = None,
    ) -> int:  # fmt: skip
        """A value, or a constant if there is data."""
        one = {"shape": list(shape), "dtype": dtype, "data": data, "scale": scale, "zero": zero,
               "axis": axis, "name": name or f"t{len(self.tensors)}"}  # fmt: skip
        self.tensors.append(one)
        return len(self.tensors) - 1

    def constant(self, array: Any, **more: Any) -> int:
        """A constant of an array's shape and type."""
        array = np.asarray(array)
        return self.tensor(array.shape, array.dtype.name, data=array, **more)

    def operator(self, name: str, inputs: list[int], outputs: list[int], **options: Any) -> int:
        """An operator; options are `b0=1` (byte, field 0), `i1=2`, `f0=1.0`.

        Returns:
            The first of the outputs.
        """
        self.operators.append({"name": name, "inputs": inputs, "outputs": outputs,
                               "options": options})  # fmt: skip
        return outputs[0]

    def bytes(self, inputs: list[int], outputs: list[int]) -> bytes:
        """The file."""
        b = flatbuffers.Builder(1024)
        names = sorted({one["name"] for one in self.operators})
        empty = _table(b, 3, {})
        buffers, numbers = [empty], []
        for one in self.tensors:
            numbers.append(0 if one["data"] is None else len(buffers))
            if one["data"] is not None:
                raw = np.ascontiguousarray(one["data"]).tobytes()
                buffers.append(_table(b, 3, {0: b.CreateByteVector(raw)}))
        tensors = [_tensor(b, one, n) for one, n in zip(self.tensors, numbers, strict=True)]
        operators = [_operator(b, one, names) for one in self.operators]
        graph = {0: _offsets(b, tensors + tensors[:1] * self.copies), 1: _vector(b, inputs, "<i4"),
                 2: _vector(b, outputs, "<i4"), 3: _offsets(b, operators)}  # fmt: skip
        graphs = _offsets(b, [_table(b, 5, graph)])
        codes = []
        for name in names:
            number = OPERATORS.index(name) if name in OPERATORS else 32
            custom = {1: b.CreateString(name)} if number == 32 else {}
            codes.append(_table(b, 4, custom, {0: ("b", min(number, 127)), 3: ("i", number)}))
        found = {1: _offsets(b, codes), 2: graphs, 4: _offsets(b, buffers)}
        b.Finish(_table(b, 8, found, {0: ("i", 3)}), file_identifier=b"TFL3")
        return bytes(b.Output())

    def write(self, path: Path, inputs: list[int], outputs: list[int]) -> Path:
        """The file, on the disk."""
        path.write_bytes(self.bytes(inputs, outputs))
        return path


def _table(b: Any, count: int, offsets: dict[int, int], numbers: Any = None) -> int:
    b.StartObject(count)
    for at, offset in offsets.items():
        b.PrependUOffsetTRelativeSlot(at, offset, 0)
    for at, (kind, value) in (numbers or {}).items():
        getattr(b, _SETTERS[kind])(at, value, 0)
    return int(b.EndObject())


def _vector(b: Any, values: Any, dtype: str) -> int:
    return int(b.CreateNumpyVector(np.asarray(values, dtype)))


def _offsets(b: Any, offsets: list[int]) -> int:
    b.StartVector(4, len(offsets), 4)
    for one in reversed(offsets):
        b.PrependUOffsetTRelative(one)
    return int(b.EndVector())


def _tensor(b: Any, one: dict[str, Any], buffer: int) -> int:
    offsets = {3: b.CreateString(one["name"]), 0: _vector(b, one["shape"], "<i4")}
    if one["scale"] is not None:
        scales = np.atleast_1d(np.float32(one["scale"]))
        zeros = np.broadcast_to(one["zero"], scales.shape)
        of = {2: _vector(b, scales, "<f4"), 3: _vector(b, zeros, "<i8")}
        offsets[4] = _table(b, 7, of, {6: ("i", one["axis"])})
    return _table(b, 8, offsets, {1: ("b", _TYPES[one["dtype"]]), 2: ("i", buffer)})


def _operator(b: Any, one: dict[str, Any], names: list[str]) -> int:
    given = {int(key[1:]): (key[0], value) for key, value in one["options"].items()}
    options = _table(b, 8, {}, given)
    offsets = {1: _vector(b, one["inputs"], "<i4"), 2: _vector(b, one["outputs"], "<i4"),
               4: options}  # fmt: skip
    numbers = {0: ("i", names.index(one["name"])), 3: ("b", _OPTIONS.get(one["name"], 0))}
    return _table(b, 9, offsets, numbers)
