"""Where the tensors of one GGUF file lie: alignment, bounds, overlaps."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import ModelFileError
from headrace.loaders.model_file import TensorInfo

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 24

AGAIN = "truncated or corrupt, download it again"


class RawTensor(NamedTuple):
    """A tensor as its header describes it."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # from the start of the tensor data
    n_bytes: int


class Header(NamedTuple):
    """What one file holds before its tensor data."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: list[RawTensor]
    end: int  # before the padding
    size: int


def _round_up(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def own_alignment(h: Header) -> int | None:
    """The alignment that a file names for itself.

    Raises:
        ModelFileError: it is no power of two within reason.
    """
    value = h.metadata.get("general.alignment")
    if value is None:
        return None
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise ModelFileError(
            f"metadata key 'general.alignment' is {str(value)[:40]}, expected a power of two up to "
            f"{MAX_ALIGNMENT}; {AGAIN}",
            path=h.path,
        )
    return value


def part_alignment(h: Header, of_first: int) -> int:
    """The alignment of a later part of a split model.

    llama.cpp writes parts that do not name theirs with 32, gguf-py with that of the first part.
    Both pad the file's end, so its size tells which; weights at the wrong place would be silent.
    """
    alignment = own_alignment(h)
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


def place(h: Header, alignment: int) -> tuple[list[TensorInfo], int]:
    """The tensors of one file at their places, and where the tensor data begins."""
    begin = _round_up(h.end, alignment)
    missing = max((begin + t.offset + t.n_bytes for t in h.tensors), default=0) - h.size
    infos: list[TensorInfo] = []
    for t in h.tensors:
        at = begin + t.offset
        if t.offset % alignment:
            raise ModelFileError(
                f"its data is not aligned to {alignment} bytes; {AGAIN}",
                path=h.path,
                tensor=t.name,
                offset=at,
            )
        if at + t.n_bytes > h.size:
            raise ModelFileError(
                f"its {t.n_bytes:,} bytes end outside the file of {h.size:,} bytes: "
                f"{missing:,} bytes are missing; {AGAIN}",
                path=h.path,
                tensor=t.name,
                offset=at,
            )
        infos.append(TensorInfo(t.name, t.type, t.shape, h.path, at, t.n_bytes))
    infos.sort(key=lambda t: t.offset)
    for a, b in pairwise(infos):
        if a.offset + a.n_bytes > b.offset:
            raise ModelFileError(
                f"its data overlaps that of tensor {a.name!r}; {AGAIN}",
                path=h.path,
                tensor=b.name,
                offset=b.offset,
            )
    return infos, begin
