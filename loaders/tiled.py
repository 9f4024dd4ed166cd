"""Our own model files: GGUF files whose matrices are already tiled, as kernels read them.

Layout 1 (`headrace.version`). Metadata and tokenizer are the source's. A matrix is one blob: a
one-dimensional tensor of type I8 whose bytes are `Format.tile` of its rows, the last tile filled
with zero rows; group-sparse ones are as `headrace.sparse.gqs` says. Four arrays, an entry for each
blob, say what the blobs are:

    headrace.tiled.names     the tensor's name
    headrace.tiled.formats   the weight format ("q4_k", "gqs_g32", a name of `headrace.sparse`)
    headrace.tiled.rows      rows of the matrix, padding not counted
    headrace.tiled.columns   inputs

All other tensors are what GGUF says they are. `general.alignment` is 4096, and tensors lie in the
order in which a model is read, without gaps beyond the alignment: vectors, then the matrices of
the embedding (when it is not the head too), the layers and the head, then what no plan reads.
GGUF tools open and list such a file; those that run models refuse its shapes.

A logical tensor, as the rest of Headrace sees it, has the true shape and the type "tiled q4_k".
Which formats exist, and how many bytes a matrix takes in one, is not known here:
`headrace.placing` checks that.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders import ggml_types
from headrace.loaders.gguf import ModelFile, StringArray, TensorInfo, read_gguf
from headrace.loaders.value_types import ARRAY, FLOAT64, SCALARS, STRING, UINT32, UINT64

VERSION = 1
ALIGNMENT = 4096
VERSION_KEY = "headrace.version"
_NAMES, _FORMATS = "headrace.tiled.names", "headrace.tiled.formats"
_ROWS, _COLUMNS = "headrace.tiled.rows", "headrace.tiled.columns"
_OWN_KEYS = re.compile(r"headrace\.|split\.|general\.alignment$")

MAX_SIDE = 1 << 31  # rows or columns; the blob's size, checked by who knows the format, says more
_FORMAT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_TILED = "tiled "
_NOTHING: Mapping[str, str | float] = MappingProxyType({})


def tiled_type(format_name: str) -> str:
    """The type of a logical tensor that is tiled in this format."""
    return _TILED + format_name


def format_name(tensor_type: str) -> str | None:
    """The format's name in the type of a tiled tensor; None for GGML's own types."""
    return tensor_type.removeprefix(_TILED) if tensor_type.startswith(_TILED) else None


def open_model(path: str | Path) -> ModelFile:
    """Read the header of a model: a GGUF file, one of ours, or a directory of safetensors files.

    Raises:
        what `headrace.loaders.huggingface.read_directory` raises.
        ModelNotFoundError, UnsupportedError, ModelFileError: see `read_gguf`; a file of a later
            layout is unsupported, and one whose descriptions do not fit its tensors is corrupt.
    """
    if os.path.isdir(path):
        from headrace.loaders.huggingface import read_directory

        return read_directory(path)
    model = read_gguf(path)
    if VERSION_KEY not in model.metadata:
        return model
    version = model.get(VERSION_KEY, int, low=1)
    if version > VERSION:
        raise UnsupportedError(
            f"written by a newer Headrace (layout {version}, this release reads {VERSION}): "
            "update Headrace",
            path=model.paths[0],
        )
    if model.alignment % ALIGNMENT:
        raise _bad(model, f"its alignment is {model.alignment}, not {ALIGNMENT}")
    described = _descriptions(model)
    tensors: dict[str, TensorInfo] = {}
    for info in model.tensors.values():
        blob = info.type == "I8" and len(info.shape) == 1
        description = described.pop(info.name, None)
        if blob != (description is not None):
            problem = "is an I8 blob, but nothing describes it" if blob else _no_blob(info)
            raise _bad(model, problem, info)
        tensors[info.name] = info if description is None else _logical(model, info, description)
    if described:
        name = next(iter(described))
        raise _bad(model, f"{_NAMES} describes {name[:80]!r}, which is no tensor of the file")
    return replace(model, tensors=tensors)


def _descriptions(model: ModelFile) -> dict[str, tuple[str, int, int]]:
    names, formats = model.get(_NAMES, StringArray), model.get(_FORMATS, StringArray)
    sides = []
    for key in (_ROWS, _COLUMNS):
        values = model.get(key, np.ndarray)
        if values.dtype.kind not in "iu":
            raise _bad(model, f"{key} is an array of {values.dtype.name}, expected integers")
        sides.append(values)
    counts = [len(names), len(formats), *map(len, sides)]
    if len(set(counts)) > 1:
        raise _bad(model, f"the arrays headrace.tiled.* have different lengths: {counts}")
    described = dict(
        zip(names, zip(formats, *(s.tolist() for s in sides), strict=True), strict=True)
    )
    if len(described) < len(names):
        raise _bad(model, f"{_NAMES} has a name twice")
    return described


def _logical(model: ModelFile, info: TensorInfo, description: tuple[str, int, int]) -> TensorInfo:
    name, rows, columns = description
    if not _FORMAT_NAME.fullmatch(name):
        raise _bad(model, f"{_FORMATS} has {name[:40]!r}, which is no name of a format", info)
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE):
        raise _bad(model, f"is described as {rows} x {columns}, not a size of a matrix", info)
    return replace(info, type=tiled_type(name), shape=(rows, columns))


def _no_blob(info: TensorInfo) -> str:
    return f"is described as tiled, but is a {info.type} tensor of shape {list(info.shape)}"


def _bad(model: ModelFile, problem: str, info: TensorInfo | None = None) -> ModelFileError:
    message = f"{problem}: changed by another program or corrupt; write the file again"
    if info is None:
        return ModelFileError(message, path=model.paths[0])
    return ModelFileError(message, path=info.path, tensor=info.name, offset=info.offset)


# ---- writing -------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor to be written. `format` is set for tiled ones, whose `shape` is the true one.

    `n_bytes` are those in the file, without the padding to the alignment.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    format: str | None = None


def build_header(
    source: ModelFile, entries: Sequence[Entry], more: Mapping[str, str | float] = _NOTHING
) -> tuple[bytes, list[int], int]:
    """The header of a file of ours: (bytes up to the tensor data, tensors' places, whole size).

    Metadata come from `source` byte for byte if it is a GGUF file, without what describes its own
    layout, and from `more`, whose keys stand for those of the source.

    Raises:
        ModelFileError: the source cannot be read again.
    """
    tiled = [e for e in entries if e.format is not None]
    keys = [
        *_copied_keys(source, more),
        _number_key("general.alignment", ALIGNMENT),
        _number_key(VERSION_KEY, VERSION),
        _strings_key(_NAMES, (e.name for e in tiled)),
        _strings_key(_FORMATS, (str(e.format) for e in tiled)),
        _sizes_key(_ROWS, [e.shape[0] for e in tiled]),
        _sizes_key(_COLUMNS, [e.shape[1] for e in tiled]),
        *(_value_key(key, value) for key, value in more.items()),
    ]
    infos, offsets, at = [], [], 0
    for e in entries:
        dims = (e.n_bytes,) if e.format is not None else tuple(reversed(e.shape))
        kind = ggml_types.BY_NAME["I8" if e.format is not None else e.type].id
        infos.append(_string(e.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at))
        offsets.append(at)
        at += -(-e.n_bytes // ALIGNMENT) * ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys))
    header = b"".join((head, *keys, *infos))
    header += bytes(-len(header) % ALIGNMENT)
    return header, [len(header) + offset for offset in offsets], len(header) + at


def layout_key(source: ModelFile, entries: Sequence[Entry], size: int) -> str:
    """What decides a file of `size` bytes but for its tensors' data and `more` of its header.

    Where `more` changes no size, it may be another one: the header is written again in its place.

    Raises:
        ModelFileError: the source cannot be read again.
    """
    return f"{size} {hashlib.sha256(build_header(source, entries)[0]).hexdigest()}"


def _copied_keys(source: ModelFile, instead: Mapping[str, str | float]) -> list[bytes]:
    path = source.paths[0]
    if not source.version:
        from headrace.loaders.metadata import encode_key

        return [
            encode_key(key, value) for key, value in source.metadata.items() if key not in instead
        ]
    n = min(source.header_bytes, path.stat().st_size)  # of a split model, those of all parts
    raw = source.read(TensorInfo("(header)", "I8", (n,), path, 0, n)).tobytes()
    keys = []
    try:
        (count,) = struct.unpack_from("<Q", raw, 16)
        pos = 24
        for _ in range(count):
            end = _skip(raw, pos, STRING)
            key = raw[pos + 8 : end].decode()
            (kind,) = struct.unpack_from("<I", raw, end)
            begin, pos = pos, _skip(raw, end + 4, kind)
            if not _OWN_KEYS.match(key) and key not in instead:
                keys.append(raw[begin:pos])
    except (struct.error, KeyError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError("the file changed while it was read", path=path) from error
    return keys


def _skip(raw: bytes, pos: int, kind: int) -> int:
    """Where a metadata value ends that begins at `pos`; the header has been validated before."""
    if kind == STRING:
        return pos + 8 + int(struct.unpack_from("<Q", raw, pos)[0])
    if kind != ARRAY:
        return pos + SCALARS[kind].size
    kind, n = struct.unpack_from("<IQ", raw, pos)
    pos += 12
    if kind in SCALARS:
        return pos + n * SCALARS[kind].size
    for _ in range(n):
        pos = _skip(raw, pos, kind)
    return pos


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _number_key(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", UINT32, value)


def _value_key(key: str, value: str | float) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", STRING) + _string(value)
    kind, form = (UINT64, "<IQ") if isinstance(value, int) else (FLOAT64, "<Id")
    return _string(key) + struct.pack(form, kind, value)


def _strings_key(key: str, values: Iterable[str]) -> bytes:
    strings = [_string(value) for value in values]
    return _string(key) + struct.pack("<IIQ", ARRAY, STRING, len(strings)) + b"".join(strings)


def _sizes_key(key: str, values: Sequence[int]) -> bytes:
    head = struct.pack("<IIQ", ARRAY, UINT32, len(values))
    return _string(key) + head + struct.pack(f"<{len(values)}I", *values)
