"""Safetensors files: the places of their tensors, checked; of one file, or of a model's shards.

    bytes                 what
    0 .. 7                n, the length of the header, little-endian
    8 .. 8 + n            JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}, and
                          maybe "__metadata__": {string: string}
    8 + n ..              tensors, row-major, little-endian, without a gap

Offsets count from the end of the header. (github.com/huggingface/safetensors, "Format".) The
`safetensors` library maps a file and gives tensors, but not where they lie, which is what weights
that are read in place need; so the header is read here, by the same rules. Tests compare the two.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.folder import Folder, parse_object, read_exactly
from headrace.loaders.foreign import looks_like
from headrace.loaders.layout import AGAIN
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.reader import open_regular

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Far above known models: DeepSeek V3 has 91,000 tensors in 163 files, with an index of 9 MB.
MAX_HEADER_BYTES = 16 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_TENSORS = 262_144
MAX_FILES = 4096
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 8

# Bits of an element. Those below a byte are packed; nothing here reads them.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class Part(NamedTuple):
    """One safetensors file; tensors are in the order of their bytes."""

    path: Path
    size: int
    header_bytes: int
    tensors: list[TensorInfo]


def read_parts(folder: Folder) -> list[Part]:
    """The headers of all safetensors files of a model directory.

    Raises:
        ModelNotFoundError: a file is missing.
        UnsupportedError: a type of elements that is not known.
        ModelFileError: truncated, corrupt or hostile, or the index and the files disagree.
    """
    if folder.has(SINGLE):  # what transformers prefers, too
        return [read_part(folder.file(SINGLE))]
    index = folder.file(INDEX)
    weight_map = folder.json(INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"there is no 'weight_map' in it; {AGAIN}", path=index)
    if len(weight_map) > MAX_TENSORS or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelFileError(
            f"'weight_map' must give the files of at most {MAX_TENSORS:,} tensors; {AGAIN}",
            path=index,
        )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_FILES:
        raise ModelFileError(
            f"{len(names):,} files, more than any known model; {AGAIN}", path=index
        )
    for name in names:
        if not name.endswith(".safetensors"):
            raise ModelFileError(
                f"'weight_map' has {name[:80]!r}, which is no .safetensors file; {AGAIN}",
                path=index,
            )
    paths = [folder.file(name, index) for name in names]
    parts = []
    for name, path in zip(names, paths, strict=True):
        part = read_part(path)
        for info in part.tensors:
            where = weight_map.get(info.name)
            if where != name:
                raise ModelFileError(
                    f"{index.name} says that this tensor is in {where!r}: "
                    "parts of different models, or corrupt; download them again",
                    path=part.path,
                    tensor=info.name,
                )
        parts.append(part)
    there = {info.name for part in parts for info in part.tensors}
    for tensor, name in weight_map.items():
        if tensor not in there:
            raise ModelFileError(
                f"{name[:80]!r} should have this tensor and has not: parts of different models, or "
                "corrupt; download them again",
                path=index,
                tensor=tensor[:MAX_NAME_LENGTH],
            )
    return parts


def read_part(path: Path) -> Part:
    """The header of one file; see `read_parts`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ModelFileError(f"the file ends after {size} bytes: download it again", path=path)
        head = read_exactly(file, min(size, 512), path)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{":
            what, advice = looks_like(head)
            raise ModelFileError(
                f"this is not a safetensors file, it looks like {what}: {advice}", path=path
            )
        if length > size - 8:
            raise ModelFileError(
                f"the file ends inside its header: {length - (size - 8):,} bytes are missing; "
                f"{AGAIN}",
                path=path,
            )
        if length > MAX_HEADER_BYTES:
            raise ModelFileError(
                f"a header of {length:,} bytes, more than any known model has; {AGAIN}", path=path
            )
        raw = (head + read_exactly(file, max(0, 8 + length - len(head)), path))[8 : 8 + length]
    # Three brackets for each tensor.
    if raw.count(b"{") > MAX_TENSORS or raw.count(b"[") > 2 * MAX_TENSORS:
        raise ModelFileError(f"the header has more than {MAX_TENSORS:,} tensors", path=path)
    entries = parse_object(raw, path, "the header")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise ModelFileError(f"'__metadata__' is no object; {AGAIN}", path=path)
    tensors = [_tensor(path, 8 + length, name, entry) for name, entry in entries.items()]
    _check_places(path, 8 + length, size, tensors)
    return Part(path, size, 8 + length, tensors)


def _tensor(path: Path, begin: int, name: str, entry: Any) -> TensorInfo:
    if not 0 < len(name) <= MAX_NAME_LENGTH or re.search(r"[\ud800-\udfff]", name):
        raise ModelFileError(f"the tensor name {name[:80]!r} is unusable; {AGAIN}", path=path)

    def bad(problem: str, kind: type[ModelFileError] = ModelFileError) -> ModelFileError:
        return kind(f"{problem}; {AGAIN}", path=path, tensor=name)

    if not isinstance(entry, dict):
        raise bad("its entry is no object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise bad("its entry has no dtype")
    bits = _BITS.get(dtype)
    if bits is None:
        raise UnsupportedError(
            f"unknown type {dtype[:40]!r}: a newer format than this release knows",
            path=path,
            tensor=name,
        )
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad(f"its shape is {str(shape)[:80]}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"its data_offsets are {str(offsets)[:80]}")
    n_bits = math.prod(shape) * bits
    if n_bits >= 1 << 63:
        raise bad(f"shape {shape} overflows 63 bits")
    if n_bits != 8 * (offsets[1] - offsets[0]):
        raise bad(
            f"{offsets[1] - offsets[0]:,} bytes, but shape {shape} of {dtype} takes {n_bits / 8:,g}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, begin + offsets[0], n_bits // 8)


def _is_sizes(value: Any) -> bool:
    # type(), not isinstance: true is no size
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_places(path: Path, begin: int, size: int, tensors: list[TensorInfo]) -> None:
    """Tensors must follow each other from the end of the header to the end of the file."""
    tensors.sort(key=lambda t: (t.offset, t.n_bytes))
    at = begin
    for t in tensors:
        if t.offset != at:
            raise ModelFileError(
                f"its data {'overlaps that of another tensor' if t.offset < at else 'has a gap'} "
                f"before it; {AGAIN}",
                path=path,
                tensor=t.name,
                offset=t.offset,
            )
        at += t.n_bytes
        if at > size:
            missing = max(t.offset + t.n_bytes for t in tensors) - size
            raise ModelFileError(
                f"its {t.n_bytes:,} bytes end outside the file of {size:,} bytes: "
                f"{missing:,} bytes are missing; {AGAIN}",
                path=path,
                tensor=t.name,
                offset=t.offset,
            )
    if at != size:
        raise ModelFileError(
            f"{size - at:,} bytes behind the last tensor belong to nothing; {AGAIN}",
            path=path,
            offset=at,
        )
