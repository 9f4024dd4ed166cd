"""GGUF files (versions 2 and 3, split or whole) as validated metadata and tensor positions.

Model files come from strangers. Every size in the file is checked against what the file holds
before memory is taken for it, every count is bounded, and whatever is wrong comes out as a
`ModelFileError` that says where and what to do. Nothing is mapped: a mapped file that shrinks
kills the process with SIGBUS.

Keys and tensor names must be valid UTF-8. String values need not be (byte-level tokenizers store
pieces of characters): they are decoded with "surrogateescape", so that
`value.encode("utf-8", "surrogateescape")` gives back the bytes of the file.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import struct
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from headrace.errors import ModelFileError, ModelNotFoundError, UnsupportedError
from headrace.loaders import ggml_types

T = TypeVar("T")
D = TypeVar("D")

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 24

# Sanity limits, far above any known model: the largest vocabularies need about 20 MB of header,
# and the largest mixture of experts 70,000 tensors when every expert is one.
MAX_HEADER_BYTES = 64 << 20
MAX_METADATA = 65_536
MAX_TENSORS = 262_144
MAX_NAME_BYTES = 1024
MAX_KEY_BYTES = 65_535
MAX_ARRAY_DEPTH = 4
MAX_NESTED_ARRAYS = 65_536

# One read covers most headers; a longer one doubles what has been read until it suffices.
FIRST_READ_BYTES = 2 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_DTYPES = {kind: np.dtype(s.format) for kind, s in _SCALARS.items()}
_U32, _U64 = _SCALARS[4], _SCALARS[10]

_REQUIRED: Any = object()
_AGAIN = "truncated or corrupt, download it again"


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

    def __len__(self) -> int:
        return len(self._starts) - 1

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
    """Where one tensor is. `shape` is in numpy's order: the reverse of what GGUF stores."""

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A validated model: the metadata and the places of the tensors, no weights.

    Metadata values are str, int, float, bool, numpy arrays (read-only) for arrays of numbers,
    `StringArray` for arrays of strings, and lists for arrays of arrays. `tensors` is in the order
    of the bytes, file by file; `header_bytes` is what lies before tensor data, over all files.
    """

    paths: tuple[Path, ...]
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    size_bytes: int
    header_bytes: int

    def read(self, info: TensorInfo, start: int = 0, n_bytes: int | None = None) -> np.ndarray:
        """The bytes of a small tensor, or part of them, as a new uint8 array."""
        n_bytes = info.n_bytes - start if n_bytes is None else n_bytes
        _check_range(info, start, n_bytes)
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


# ---- reading bytes -------------------------------------------------------------------------


def _open(path: Path) -> FileIO:
    """Open a regular file for reading; anything else is refused before it can block."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ModelFileError(_not_a_file(path, mode), path=path)
        # A FIFO put there since the stat would block without O_NONBLOCK.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = FileIO(path, "r", opener=lambda p, _: os.open(p, flags))
    except FileNotFoundError:
        link = " (a link to a file that is gone)" if path.is_symlink() else ""
        raise ModelNotFoundError(f"{path}: no such file{link}; check the path") from None
    except PermissionError:
        raise ModelFileError("permission denied: make the file readable", path=path) from None
    except ValueError as error:  # a NUL in the name
        raise ModelNotFoundError(f"{str(path)!r} is not a file name: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise ModelNotFoundError(f"{path}: {error.strerror}; check the path") from None
        raise ModelFileError(f"cannot be opened: {error.strerror}", path=path) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ModelFileError("changed while it was opened, not a regular file", path=path)
    return file


def _not_a_file(path: Path, mode: int) -> str:
    if stat.S_ISDIR(mode):
        names = sorted(p.name for p in path.glob("*.gguf"))[:3]
        hint = f"give a file in it, such as {names[0]}" if names else "there is no .gguf file in it"
        return f"a directory, not a model file: {hint}"
    kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
    return f"{kind}, not a regular file: copy the model to a file first"


def _check_range(info: TensorInfo, start: int, n_bytes: int) -> None:
    # The caller's mistake, not the file's: hence no ModelFileError.
    if start < 0 or n_bytes < 0 or start + n_bytes > info.n_bytes:
        raise ValueError(
            f"bytes {start} to {start + n_bytes} are outside tensor {info.name!r} "
            f"of {info.n_bytes} bytes"
        )


class TensorReader:
    """Reads tensors into the caller's memory; keeps the files open between reads.

    `readinto` may be called from several threads at once. `close` may not be called while a read
    is going on.
    """

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()
        self._closed = False

    def readinto(self, info: TensorInfo, start: int, buffer: Any) -> None:
        """Fill `buffer` (writable, contiguous) from byte `start` of the tensor.

        Raises:
            ModelFileError: the file shrank since its header was read, or the device failed.
            ValueError: the range is not inside the tensor.
        """
        view = memoryview(buffer)
        _check_range(info, start, view.nbytes)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        file = self._file(info.path)
        done = 0
        while done < len(view):
            offset = info.offset + start + done
            try:
                n = self._read_once(file, view[done:], offset)
            except OSError as error:
                raise ModelFileError(
                    f"read failed: {error.strerror}",
                    path=info.path,
                    tensor=info.name,
                    offset=offset,
                ) from error
            if n == 0:
                raise ModelFileError(
                    f"the file shrank: it ends {len(view) - done:,} bytes early. Do not write to a "
                    "model that is in use; download it again",
                    path=info.path,
                    tensor=info.name,
                    offset=offset,
                )
            done += n

    def _read_once(self, file: FileIO, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self._lock:
            file.seek(offset)
            return file.readinto(view) or 0

    def _file(self, path: Path) -> FileIO:
        with self._lock:
            if self._closed:
                raise ValueError("this TensorReader is closed")
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _open(path)
            return file

    def close(self) -> None:
        """Close all files; the reader cannot be used again."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- the header ----------------------------------------------------------------------------


class _RawTensor(NamedTuple):
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # from the start of the tensor data
    n_bytes: int


class _Header(NamedTuple):
    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: list[_RawTensor]
    end: int  # before the padding
    size: int


class _Cursor:
    """A position in a file's first bytes, more of which are read when they are needed."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.pos = 0
        self.nested_left = MAX_NESTED_ARRAYS
        self._file = file
        self.data = b""
        self._extend(min(self.size, FIRST_READ_BYTES))

    def _extend(self, end: int) -> None:
        chunks = [self.data]
        have = len(self.data)
        while have < end:
            try:
                chunk = self._file.read(end - have)
            except OSError as error:
                raise self.error(f"read failed: {error.strerror}") from error
            if not chunk:
                raise self.error("the file shrank while it was read")
            chunks.append(chunk)
            have += len(chunk)
        self.data = b"".join(chunks)

    def need(self, n_bytes: int, what: str) -> None:
        """Make sure that `data` holds `n_bytes` from here on."""
        end = self.pos + n_bytes
        if end <= len(self.data):
            return
        if end > self.size:
            raise self.error(
                f"the file ends inside {what}: {end - self.size:,} bytes are missing; {_AGAIN}"
            )
        if end > MAX_HEADER_BYTES:
            raise self.error(
                f"{what} makes the header longer than {MAX_HEADER_BYTES >> 20} MiB, "
                "more than any known model has: corrupt, download it again"
            )
        self._extend(min(self.size, MAX_HEADER_BYTES, max(end, 2 * len(self.data))))

    def check_count(self, n: int, element_bytes: int, what: str) -> None:
        """Refuse a count of things that the rest of the file cannot hold."""
        if n * element_bytes > self.size - self.pos:
            raise self.error(
                f"{what} has {n:,} elements of at least {element_bytes} bytes, "
                f"but only {self.size - self.pos:,} bytes follow; {_AGAIN}"
            )

    def number(self, form: struct.Struct, what: str) -> Any:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.data, self.pos)
        self.pos += form.size
        return value

    def bytes(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
        n: int = self.number(_U64, what)
        if n > max_bytes and n <= self.size - self.pos:
            raise self.error(f"{what} is {n:,} bytes long, at most {max_bytes:,} are allowed")
        self.need(n, what)
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def identifier(self, what: str, max_bytes: int) -> str:
        raw = self.bytes(what, max_bytes)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8: {raw[:40]!r}; {_AGAIN}") from None

    def error(
        self, message: str, kind: type[ModelFileError] = ModelFileError, **where: Any
    ) -> ModelFileError:
        return kind(message, path=self.path, offset=self.pos, **where)


def _value(c: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    if kind == _STRING:
        return c.bytes(what).decode("utf-8", "surrogateescape")
    if kind == _ARRAY:
        return _array(c, what, depth)
    form = _SCALARS.get(kind)
    if form is None:
        raise c.error(f"{what} has the unknown value type {kind}; {_AGAIN}")
    value = c.number(form, what)
    if kind == _BOOL:
        if value > 1:
            raise c.error(f"{what} is a bool of value {value}; {_AGAIN}")
        return bool(value)
    return value


def _array(c: _Cursor, what: str, depth: int) -> Any:
    kind: int = c.number(_U32, what)
    n: int = c.number(_U64, what)
    if kind == _STRING:
        return _string_array(c, n, what)
    if kind == _ARRAY:
        c.check_count(n, 12, what)
        c.nested_left -= n
        if depth + 1 >= MAX_ARRAY_DEPTH or c.nested_left < 0:
            raise c.error(
                f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH} or more than "
                f"{MAX_NESTED_ARRAYS:,} times",
                UnsupportedError,
            )
        return [_array(c, what, depth + 1) for _ in range(n)]
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise c.error(f"{what} is an array of the unknown value type {kind}; {_AGAIN}")
    c.check_count(n, dtype.itemsize, what)
    c.need(n * dtype.itemsize, what)
    # astype copies: the array must not keep the whole header in memory
    values = np.frombuffer(c.data, dtype, n, c.pos).astype(dtype.newbyteorder("="))
    if kind == _BOOL:
        if n and values.max() > 1:
            raise c.error(f"{what} holds a bool that is neither 0 nor 1; {_AGAIN}")
        values = values.view(np.bool_)
    values.flags.writeable = False
    c.pos += n * dtype.itemsize
    return values


def _string_array(c: _Cursor, n: int, what: str) -> StringArray:
    c.check_count(n, 8, what)
    begin = c.pos
    starts = array("I")  # MAX_HEADER_BYTES < 2**32
    while True:
        # The hot loop of opening a model (100,000 turns, 7 ms): it only follows the lengths and
        # leaves running out of data to the exception.
        data, pos, add, length_at = c.data, c.pos, starts.append, _U64.unpack_from
        try:
            for _ in range(n - len(starts)):
                (length,) = length_at(data, pos)
                add(pos - begin)
                pos += 8 + length
        except (struct.error, OverflowError):  # the latter: pos is beyond any memory
            # Either more must be read, or the string before pos ends outside the file.
            c.pos = begin + starts[-1] if starts else begin
            c.need(pos + 8 - c.pos, what)
            c.pos = pos
        else:
            c.pos = begin
            c.need(pos - begin, what)
            c.pos = pos
            starts.append(pos - begin)
            return StringArray(c.data[begin:pos], starts)


def _metadata(c: _Cursor, n: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(n):
        key = c.identifier(f"the name of metadata key {i}", MAX_KEY_BYTES)
        what = f"metadata key {key[:80]!r}"
        if key in metadata:
            raise c.error(f"{what} occurs twice; {_AGAIN}")
        metadata[key] = _value(c, c.number(_U32, what), what)
    return metadata


def _tensor(c: _Cursor, index: int) -> _RawTensor:
    name = c.identifier(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"the entry of tensor {name!r}"
    n_dims = c.number(_U32, what)
    if n_dims > 4:
        raise c.error(f"{n_dims} dimensions, at most 4 are allowed; {_AGAIN}", tensor=name)
    ne = [c.number(_U64, what) for _ in range(n_dims)]
    if 0 in ne:
        raise c.error(f"a dimension is 0 in {ne}; {_AGAIN}", tensor=name)
    type_id = c.number(_U32, what)
    offset = c.number(_U64, what)
    ggml = ggml_types.BY_ID.get(type_id)
    if ggml is None:
        raise c.error(ggml_types.why_unsupported(type_id), UnsupportedError, tensor=name)
    n_elements = math.prod(ne)
    if n_elements >= 1 << 63:
        raise c.error(f"shape {ne} overflows 63 bits; {_AGAIN}", tensor=name)
    row = ne[0] if ne else 1
    if row % ggml.block_elements:
        raise c.error(
            f"rows of {row} elements are no multiple of the {ggml.block_elements} in a block of "
            f"{ggml.name}; {_AGAIN}",
            tensor=name,
        )
    n_bytes = n_elements // ggml.block_elements * ggml.block_bytes
    return _RawTensor(name, ggml.name, tuple(reversed(ne)), offset, n_bytes)


def _read_header(path: Path) -> _Header:
    with _open(path) as file:
        c = _Cursor(file, path)
        _check_magic(c)
        version = _version(c)
        n_tensors: int = c.number(_U64, "the tensor count")
        n_metadata: int = c.number(_U64, "the metadata count")
        c.check_count(n_metadata, 13, "the metadata")
        c.check_count(n_tensors, 24, "the tensor list")
        if n_metadata > MAX_METADATA or n_tensors > MAX_TENSORS:
            raise c.error(
                f"{n_tensors:,} tensors and {n_metadata:,} metadata keys, at most {MAX_TENSORS:,} "
                f"and {MAX_METADATA:,} are supported",
                UnsupportedError,
            )
        metadata = _metadata(c, n_metadata)
        tensors: dict[str, _RawTensor] = {}
        for i in range(n_tensors):
            tensor = _tensor(c, i)
            if tensor.name in tensors:
                raise c.error(f"this name occurs twice; {_AGAIN}", tensor=tensor.name)
            tensors[tensor.name] = tensor
        return _Header(path, version, metadata, list(tensors.values()), c.pos, c.size)


def _version(c: _Cursor) -> int:
    version: int = c.number(_U32, "the version")
    if version in (2, 3):
        return version
    if version == 1:
        problem = "GGUF version 1, which nothing has written since 2023: convert the model again"
    elif version and version & 0xFFFF == 0:
        problem = "a big-endian GGUF file: convert it with gguf_convert_endian.py of llama.cpp"
    elif version == 0 or version > 100:
        raise c.error(f"GGUF version {version} does not exist; {_AGAIN}")
    else:
        problem = f"GGUF version {version}, newer than this release reads (2 and 3): update it"
    raise c.error(problem, UnsupportedError)


# ---- files that are something else ---------------------------------------------------------

_OLD = "convert it to GGUF, or download a GGUF file of the model"
_UNPACK = "unpack it first"
_PICKLE = (
    "it is not opened, because loading it can run any code. Convert it to GGUF with "
    "convert_hf_to_gguf.py of llama.cpp"
)
# (offset, bytes there, what the file is, what to do)
_FOREIGN = (
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer",
        "run `git lfs pull`, or download the file",
    ),
    (0, b"FUGG", "a GGUF file with its bytes swapped", "download it again"),
    (0, b"lmgg", "a GGML file from before GGUF", _OLD),
    (0, b"fmgg", "a GGML file from before GGUF", _OLD),
    (0, b"tjgg", "a GGML file from before GGUF", _OLD),
    (0, b"algg", "a GGML adapter from before GGUF", _OLD),
    (0, b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint", _PICKLE),
    (0, b"\x80\x02", "a Python pickle or PyTorch checkpoint", _PICKLE),
    (0, b"\x80\x03", "a Python pickle", _PICKLE),
    (0, b"\x80\x04", "a Python pickle", _PICKLE),
    (0, b"\x80\x05", "a Python pickle", _PICKLE),
    (0, b"\x93NUMPY", "a numpy array", _OLD),
    (0, b"\x89HDF", "an HDF5 file", _OLD),
    (4, b"TFL3", "a TensorFlow Lite model", _OLD),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
)


def _check_magic(c: _Cursor) -> None:
    head = c.data[:512]
    if head[:4] == b"GGUF":
        c.pos = 4
        return
    if not head:
        raise c.error("the file is empty: download it again")
    if b"GGUF".startswith(head[:4]):
        raise c.error(f"the file ends after {len(head)} bytes: download it again")
    what, advice = _looks_like(head)
    raise c.error(f"this is not a GGUF file, it looks like {what}: {advice}")


def _looks_like(head: bytes) -> tuple[str, str]:
    for offset, magic, what, advice in _FOREIGN:
        if head.startswith(magic, offset):
            return what, advice
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|head|\?xml|!--)", text, re.IGNORECASE):
        return "a web page", (
            "the download saved a page (log-in, error or preview) instead of the model. Use the "
            "link of the file itself (/resolve/, not /blob/, on Hugging Face)"
        )
    # safetensors: the length of a JSON object, then the object
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return "a safetensors file", "give it its own name, .safetensors, and its config.json"
    if text[:16].startswith(b'{"__metadata__"'):
        return "the header of a safetensors file", "download the whole file again"
    if text[:1] in (b"{", b"["):
        return "JSON", f"perhaps an error message of the server, read it. It begins {text[:60]!r}"
    if not any(head):
        return "zeros", "a download that reserved the space and never finished, start it again"
    return "nothing known", f"it begins with {head[:8]!r}; download it again"


# ---- from headers to a model ---------------------------------------------------------------


def _round_up(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _own_alignment(h: _Header) -> int | None:
    value = h.metadata.get("general.alignment")
    if value is None:
        return None
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise ModelFileError(
            f"metadata key 'general.alignment' is {str(value)[:40]}, expected a power of two up to "
            f"{MAX_ALIGNMENT}; {_AGAIN}",
            path=h.path,
        )
    return value


def _part_alignment(h: _Header, of_first: int) -> int:
    """The alignment of a later part of a split model.

    llama.cpp writes parts that do not name theirs with 32, gguf-py with that of the first part.
    Both pad the file's end, so its size tells which; weights at the wrong place would be silent.
    """
    alignment = _own_alignment(h)
    if alignment is not None:
        return alignment
    used = max((t.offset + t.n_bytes for t in h.tensors), default=0)
    low, high = sorted((DEFAULT_ALIGNMENT, of_first))
    if _round_up(h.end, low) == _round_up(h.end, high):
        return low
    fitting = [
        a
        for a in (low, high)
        if h.size - _round_up(h.end, a) in (used, _round_up(used, a))
        and all(t.offset % a == 0 for t in h.tensors)
    ]
    if len(fitting) != 1:
        raise ModelFileError(
            f"this part names no general.alignment, and its size fits neither or both of {low} "
            f"and {high}: download it again, or merge the parts with llama-gguf-split",
            path=h.path,
        )
    return fitting[0]


def _place(h: _Header, alignment: int) -> tuple[list[TensorInfo], int]:
    """The tensors of one file at their places, and where the tensor data begins."""
    begin = _round_up(h.end, alignment)
    missing = max((begin + t.offset + t.n_bytes for t in h.tensors), default=0) - h.size
    infos: list[TensorInfo] = []
    for t in h.tensors:
        at = begin + t.offset
        if t.offset % alignment:
            raise ModelFileError(
                f"its data is not aligned to {alignment} bytes; {_AGAIN}",
                path=h.path,
                tensor=t.name,
                offset=at,
            )
        if at + t.n_bytes > h.size:
            raise ModelFileError(
                f"its {t.n_bytes:,} bytes end outside the file of {h.size:,} bytes: "
                f"{missing:,} bytes are missing; {_AGAIN}",
                path=h.path,
                tensor=t.name,
                offset=at,
            )
        infos.append(TensorInfo(t.name, t.type, t.shape, h.path, at, t.n_bytes))
    infos.sort(key=lambda t: t.offset)
    for a, b in pairwise(infos):
        if a.offset + a.n_bytes > b.offset:
            raise ModelFileError(
                f"its data overlaps that of tensor {a.name!r}; {_AGAIN}",
                path=h.path,
                tensor=b.name,
                offset=b.offset,
            )
    return infos, begin


_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


def _part_paths(h: _Header, count: int) -> list[Path]:
    match = _PART_NAME.fullmatch(h.path.name)
    if match is None or int(match["count"]) != count:
        raise ModelFileError(
            f"a part of a model split in {count}, but its name does not end in "
            f"-00001-of-{count:05}.gguf: give the parts their original names",
            path=h.path,
        )
    paths = [
        h.path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ModelFileError(
            f"{len(missing)} of {count} parts of this model are missing: "
            f"{', '.join(missing[:5])}{more}. Download them into the same directory",
            path=h.path,
        )
    return paths


def _split_key(h: _Header, name: str, default: int) -> int:
    value = h.metadata.get(f"split.{name}", default)
    if type(value) is not int or value < 0:
        raise ModelFileError(
            f"metadata key 'split.{name}' is {str(value)[:40]}, expected a count", path=h.path
        )
    return value


def _all_headers(h: _Header) -> list[_Header]:
    count = _split_key(h, "count", 0)
    if count <= 1:
        return [h]
    headers = []
    for i, path in enumerate(_part_paths(h, count)):
        part = h if path == h.path else _read_header(path)
        no, its_count = _split_key(part, "no", 0), _split_key(part, "count", 0)
        if (no, its_count) != (i, count):
            raise ModelFileError(
                f"its name says part {i + 1} of {count}, its metadata part {no + 1} of "
                f"{its_count}: a renamed file, or parts of different models",
                path=path,
            )
        headers.append(part)
    found = sum(len(part.tensors) for part in headers)
    expected = _split_key(headers[0], "tensors.count", found)
    if found != expected:
        raise ModelFileError(
            f"the parts hold {found} tensors, split.tensors.count says {expected}: parts of "
            "different models, or corrupt; download them again",
            path=headers[0].path,
        )
    return headers


def read_gguf(path: str | Path) -> ModelFile:
    """Read and validate the header of a GGUF model; of a split model, any part will do.

    Metadata is that of the first part. Weights are not read.

    Raises:
        ModelNotFoundError: there is no such file.
        UnsupportedError: a version, byte order or tensor type that is not read.
        ModelFileError: not a GGUF file, truncated, corrupt or hostile, or a part is missing.
    """
    headers = _all_headers(_read_header(Path(path)))
    first = headers[0]
    alignment = _own_alignment(first) or DEFAULT_ALIGNMENT
    tensors: dict[str, TensorInfo] = {}
    header_bytes = 0
    for i, h in enumerate(headers):
        infos, begin = _place(h, _part_alignment(h, alignment) if i else alignment)
        header_bytes += min(begin, h.size)
        for info in infos:
            if info.name in tensors:
                raise ModelFileError(
                    f"two parts have a tensor of this name; {_AGAIN}", path=h.path, tensor=info.name
                )
            tensors[info.name] = info
    return ModelFile(
        paths=tuple(h.path for h in headers),
        version=first.version,
        alignment=alignment,
        metadata=first.metadata,
        tensors=tensors,
        size_bytes=sum(h.size for h in headers),
        header_bytes=header_bytes,
    )
