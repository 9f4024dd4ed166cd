"""GGUF files (versions 2 and 3, split or whole) as validated metadata and tensor positions.

Model files come from strangers. Every size in the file is checked against what the file holds
before memory is taken for it, every count is bounded, and whatever is wrong comes out as a
`ModelFileError` that says where and what to do.

Keys and tensor names must be valid UTF-8. String values need not be (byte-level tokenizers store
pieces of characters): they are decoded with "surrogateescape", so that
`value.encode("utf-8", "surrogateescape")` gives back the bytes of the file.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders import ggml_types
from headrace.loaders.foreign import looks_like
from headrace.loaders.layout import (
    AGAIN,
    DEFAULT_ALIGNMENT,
    Header,
    RawTensor,
    own_alignment,
    part_alignment,
    place,
)
from headrace.loaders.model_file import ModelFile, StringArray, TensorInfo
from headrace.loaders.reader import TensorReader, open_regular
from headrace.loaders.split import all_headers
from headrace.loaders.value_types import ARRAY, BOOL, SCALARS, STRING, UINT32, UINT64
from headrace.loaders.whole_scales import with_whole_scales

__all__ = ["ModelFile", "StringArray", "TensorInfo", "TensorReader", "read_gguf"]

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

_DTYPES = {kind: np.dtype(s.format) for kind, s in SCALARS.items()}
_U32, _U64 = SCALARS[UINT32], SCALARS[UINT64]


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
                f"the file ends inside {what}: {end - self.size:,} bytes are missing; {AGAIN}"
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
                f"but only {self.size - self.pos:,} bytes follow; {AGAIN}"
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
            raise self.error(f"{what} is not valid UTF-8: {raw[:40]!r}; {AGAIN}") from None

    def error(
        self, message: str, kind: type[ModelFileError] = ModelFileError, **where: Any
    ) -> ModelFileError:
        return kind(message, path=self.path, offset=self.pos, **where)


def _value(c: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    if kind == STRING:
        return c.bytes(what).decode("utf-8", "surrogateescape")
    if kind == ARRAY:
        return _array(c, what, depth)
    form = SCALARS.get(kind)
    if form is None:
        raise c.error(f"{what} has the unknown value type {kind}; {AGAIN}")
    value = c.number(form, what)
    if kind == BOOL:
        if value > 1:
            raise c.error(f"{what} is a bool of value {value}; {AGAIN}")
        return bool(value)
    return value


def _array(c: _Cursor, what: str, depth: int) -> Any:
    kind: int = c.number(_U32, what)
    n: int = c.number(_U64, what)
    if kind == STRING:
        return _string_array(c, n, what)
    if kind == ARRAY:
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
        raise c.error(f"{what} is an array of the unknown value type {kind}; {AGAIN}")
    c.check_count(n, dtype.itemsize, what)
    c.need(n * dtype.itemsize, what)
    # astype copies: the array must not keep the whole header in memory
    values = np.frombuffer(c.data, dtype, n, c.pos).astype(dtype.newbyteorder("="))
    if kind == BOOL:
        if n and values.max() > 1:
            raise c.error(f"{what} holds a bool that is neither 0 nor 1; {AGAIN}")
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
            raise c.error(f"{what} occurs twice; {AGAIN}")
        metadata[key] = _value(c, c.number(_U32, what), what)
    return metadata


def _tensor(c: _Cursor, index: int) -> RawTensor:
    name = c.identifier(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"the entry of tensor {name!r}"
    n_dims = c.number(_U32, what)
    if n_dims > 4:
        raise c.error(f"{n_dims} dimensions, at most 4 are allowed; {AGAIN}", tensor=name)
    ne = [c.number(_U64, what) for _ in range(n_dims)]
    if 0 in ne:
        raise c.error(f"a dimension is 0 in {ne}; {AGAIN}", tensor=name)
    type_id = c.number(_U32, what)
    offset = c.number(_U64, what)
    ggml = ggml_types.BY_ID.get(type_id)
    if ggml is None:
        raise c.error(ggml_types.why_unsupported(type_id), UnsupportedError, tensor=name)
    n_elements = math.prod(ne)
    if n_elements >= 1 << 63:
        raise c.error(f"shape {ne} overflows 63 bits; {AGAIN}", tensor=name)
    row = ne[0] if ne else 1
    if row % ggml.block_elements:
        raise c.error(
            f"rows of {row} elements are no multiple of the {ggml.block_elements} in a block of "
            f"{ggml.name}; {AGAIN}",
            tensor=name,
        )
    n_bytes = n_elements // ggml.block_elements * ggml.block_bytes + ggml.tail
    return RawTensor(name, ggml.name, tuple(reversed(ne)), offset, n_bytes)


def _read_header(path: Path) -> Header:
    with open_regular(path) as file:
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
        tensors: dict[str, RawTensor] = {}
        for i in range(n_tensors):
            tensor = _tensor(c, i)
            if tensor.name in tensors:
                raise c.error(f"this name occurs twice; {AGAIN}", tensor=tensor.name)
            tensors[tensor.name] = tensor
        return Header(path, version, metadata, list(tensors.values()), c.pos, c.size)


def _version(c: _Cursor) -> int:
    version: int = c.number(_U32, "the version")
    if version in (2, 3):
        return version
    if version == 1:
        problem = "GGUF version 1, which nothing has written since 2023: convert the model again"
    elif version and version & 0xFFFF == 0:
        problem = "a big-endian GGUF file: convert it with gguf_convert_endian.py of llama.cpp"
    elif version == 0 or version > 100:
        raise c.error(f"GGUF version {version} does not exist; {AGAIN}")
    else:
        problem = f"GGUF version {version}, newer than this release reads (2 and 3): update it"
    raise c.error(problem, UnsupportedError)


def _check_magic(c: _Cursor) -> None:
    head = c.data[:512]
    if head[:4] == b"GGUF":
        c.pos = 4
        return
    if not head:
        raise c.error("the file is empty: download it again")
    if b"GGUF".startswith(head[:4]):
        raise c.error(f"the file ends after {len(head)} bytes: download it again")
    what, advice = looks_like(head)
    raise c.error(f"this is not a GGUF file, it looks like {what}: {advice}")


def read_gguf(path: str | Path) -> ModelFile:
    """Read and validate the header of a GGUF model; of a split model, any part will do.

    Metadata is that of the first part. Weights are not read.

    Raises:
        ModelNotFoundError: there is no such file.
        UnsupportedError: a version, byte order or tensor type that is not read.
        ModelFileError: not a GGUF file, truncated, corrupt or hostile, or a part is missing.
    """
    headers = all_headers(_read_header(Path(path)), _read_header)
    first = headers[0]
    alignment = own_alignment(first) or DEFAULT_ALIGNMENT
    tensors: dict[str, TensorInfo] = {}
    header_bytes = 0
    for i, h in enumerate(headers):
        infos, begin = place(h, part_alignment(h, alignment) if i else alignment)
        header_bytes += min(begin, h.size)
        for info in infos:
            if info.name in tensors:
                raise ModelFileError(
                    f"two parts have a tensor of this name; {AGAIN}", path=h.path, tensor=info.name
                )
            tensors[info.name] = info
    return ModelFile(
        paths=tuple(h.path for h in headers),
        version=first.version,
        alignment=alignment,
        metadata=first.metadata,
        tensors=with_whole_scales(tensors),
        size_bytes=sum(h.size for h in headers),
        header_bytes=header_bytes,
    )
