"""A model file as data: validated metadata behind typed getters, and the places of its tensors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from headrace.errors import ModelFileError
from headrace.loaders.reader import TensorReader, check_range

T = TypeVar("T")
D = TypeVar("D")

_REQUIRED: Any = object()


class StringArray(Sequence[str]):
    """An array of strings from a header, decoded when asked for, and not kept.

    Of a 49k vocabulary with its merges this holds 2 MB instead of 8, and opening the file does
    not pay for strings that `plan` or `inspect` never look at. `tolist()` decodes all of them.
    """

    __slots__ = ("_raw", "_starts")

    def __init__(self, raw: bytes, starts: array[int]) -> None:
        # raw is what the file holds; starts has one entry more than there are strings, and the
        # 8 bytes at each start are the length of the string behind them.
        self._raw = raw
        self._starts = starts

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringArray:
        """The array that a header with these strings has.

        Raises:
            UnicodeEncodeError: a lone surrogate that stands for no byte.
        """
        texts = [text.encode("utf-8", "surrogateescape") for text in strings]
        lengths = np.array([len(text) for text in texts], "<u8")
        packed = lengths.tobytes()
        parts = [b""] * (2 * len(texts))
        parts[::2] = [packed[at : at + 8] for at in range(0, len(packed), 8)]
        parts[1::2] = texts
        starts = np.zeros(len(texts) + 1, np.uint64)
        np.cumsum(lengths + 8, out=starts[1:])
        return cls(b"".join(parts), array("I", starts.tolist()))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def packed(self) -> bytes:
        """All strings as they lie in a header: each behind its length."""
        return self._raw

    def raw(self, index: int) -> bytes:
        """The bytes of one string as the file has them."""
        index = range(len(self))[index]
        return self._raw[self._starts[index] + 8 : self._starts[index + 1]]

    def tolist(self) -> list[str]:
        """All strings."""
        raw, starts = self._raw, self._starts.tolist()
        return [raw[a + 8 : b].decode("utf-8", "surrogateescape") for a, b in pairwise(starts)]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self._raw == other._raw and self._starts == other._starts
        return isinstance(other, list) and self.tolist() == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        head = ", ".join(repr(s) for s in self[:4])
        return f"<StringArray of {len(self)}: {head}{', ...' if len(self) > 4 else ''}>"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor is. `shape` is in numpy's order: the reverse of what GGUF stores.

    `type` is GGML's name, that of safetensors where there is none, or see `loaders.tiled`.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int
    scales: Scales | None = None


@dataclass(frozen=True, slots=True)
class Scales:
    """What a matrix is to be multiplied by: a scale for each block of `rows` x `columns` weights.

    `info.shape` is (blocks of rows, blocks of columns); the last ones may stick out. All of them
    may have a scale in common, or be `divided` by it: `whole`, of shape (1, 1).
    """

    info: TensorInfo
    rows: int
    columns: int
    whole: TensorInfo | None = None
    divided: bool = False


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A validated model: the metadata and the places of the tensors, no weights.

    Metadata values are str, int, float, bool, numpy arrays (read-only) for arrays of numbers,
    `StringArray` for arrays of strings, and lists for arrays of arrays. `tensors` is in the order
    of the bytes, file by file; `header_bytes` is what lies before tensor data, over all files.
    `version` is GGUF's, and 0 for a safetensors directory: then the first of `paths` is its
    config.json, and keys and names are those that a GGUF file of the model would have.
    """

    paths: tuple[Path, ...]
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    size_bytes: int
    header_bytes: int

    @property
    def source(self) -> Path:
        """What one names to load it: the (first) file, or the directory."""
        return self.paths[0] if self.version else self.paths[0].parent

    def read(self, info: TensorInfo, start: int = 0, n_bytes: int | None = None) -> np.ndarray:
        """The bytes of a small tensor, or part of them, as a new uint8 array."""
        n_bytes = info.n_bytes - start if n_bytes is None else n_bytes
        check_range(info, start, n_bytes)
        buffer = np.empty(n_bytes, np.uint8)
        with TensorReader() as reader:
            reader.readinto(info, start, buffer)
        return buffer

    @overload
    def get(
        self, key: str, kind: type[T], *, low: float | None = ..., high: float | None = ...
    ) -> T: ...
    @overload
    def get(
        self,
        key: str,
        kind: type[T],
        default: D,
        *,
        low: float | None = ...,
        high: float | None = ...,
    ) -> T | D: ...
    def get(
        self,
        key: str,
        kind: Any,
        default: Any = _REQUIRED,
        *,
        low: float | None = None,
        high: float | None = None,
    ) -> Any:
        """A metadata value of a known type.

        Args:
            kind: str, int, float (takes ints too), bool, np.ndarray, StringArray, or list,
                which takes every array.
            default: returned as it is when there is no such key; without it the key is required.
            low, high: inclusive bounds of an int or float. NaN and infinity never pass.

        Raises:
            ModelFileError: no such key, another type, or out of bounds.
        """
        value: Any = self.metadata.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self._bad(key, f"is missing ({kind.__name__} expected)")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if kind is list and isinstance(value, (StringArray, np.ndarray)):
            value = value.tolist()
        # type(), not isinstance: True is no layer count
        if type(value) is not kind:
            raise self._bad(key, f"is {_describe(value)}, expected {kind.__name__}")
        if kind is int or kind is float:
            self._check_bounds(key, value, low, high)
        return value

    def get_per_layer(
        self,
        key: str,
        n_layers: int,
        default: int | None = None,
        *,
        low: int | None = None,
        high: int | None = None,
    ) -> list[int]:
        """A key that is one int for all layers or an array with one for each.

        Raises:
            ModelFileError: no such key and no default, not ints, wrong count, or out of bounds.
        """
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray):
            absent = default is not None and value is None
            one = default if absent else self.get(key, int, low=low, high=high)
            return [one] * n_layers  # type: ignore[list-item]
        if value.dtype.kind not in "iu":
            raise self._bad(key, f"is {_describe(value)}, expected ints")
        if len(value) != n_layers:
            raise self._bad(key, f"has {len(value)} values for {n_layers} layers")
        values: list[int] = value.tolist()
        for layer_value in values:
            self._check_bounds(key, layer_value, low, high)
        return values

    def _check_bounds(self, key: str, value: float, low: float | None, high: float | None) -> None:
        if not math.isfinite(value):
            raise self._bad(key, f"is {value}, expected a finite number")
        if low is not None and value < low:
            raise self._bad(key, f"is {value}, expected at least {low}")
        if high is not None and value > high:
            raise self._bad(key, f"is {value}, expected at most {high}")

    def _bad(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"metadata key {key!r} {problem}", path=self.paths[0])


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    if isinstance(value, StringArray):
        return "an array of str"
    return "an array of arrays" if isinstance(value, list) else type(value).__name__
