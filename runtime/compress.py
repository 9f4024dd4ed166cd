"""Write a model as one of our own files: matrices tiled, in the order in which they are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from headrace.atomic_file import whole_file
from headrace.errors import HeadraceError, UnsupportedError
from headrace.families import describe
from headrace.families.decoder import tensor_of
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.sources import resolve
from headrace.loaders.tiled import (
    Entry,
    build_header,
    format_name,
    open_model,
    tiled_type,
)
from headrace.placing import PlacedMatrix, place
from headrace.rows import read_tiled
from headrace.sizes import format_size

Progress = Callable[[int, int | None, str], None]

FORMATS = ("keep",)
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Compressed:
    """What was written; sizes in bytes."""

    path: Path
    source_bytes: int
    size_bytes: int


def compress(
    src: str | Path,
    dst: str | Path,
    *,
    format: str = "keep",
    force: bool = False,
    progress: Progress | None = None,
) -> Compressed:
    """Write a model file that loads without being repacked.

    Little of a model is in memory at a time. `dst` appears when it is complete, or not at all.

    Args:
        src: whatever `headrace.load` takes.
        dst: the file to write.
        format: "keep" leaves each matrix in the format in which it loads.
        force: replace `dst` if there is such a file.
        progress: called with (done, total, what).

    Raises:
        UnsupportedError: no such format, or a model that cannot run.
        ModelNotFoundError, DownloadError, ModelFileError: no usable source.
        HeadraceError: `dst` exists or cannot be written.
    """
    if format not in FORMATS:
        raise UnsupportedError(f"there is no format {format!r}; there is: {', '.join(FORMATS)}")
    target = Path(os.path.expanduser(dst))
    _check_target(target, force)
    model = open_model(resolve(src, progress=progress))
    if target.exists() and any(os.path.samefile(path, target) for path in model.paths):
        raise HeadraceError(f"{target} is the model to be read; write to another file")
    entries, sources = _entries(model)
    header, places, size = build_header(model, entries)
    try:
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise HeadraceError(
                f"the disk of {target.parent} has {format_size(free)} free, and {target.name} "
                f"takes {format_size(size)}; free some space"
            )
        # Another file of that name may come in the meantime.
        check = partial(_check_target, target, force)
        with whole_file(target, check=check) as file, TensorReader() as reader:
            file.write(header)
            for source, place_at, entry in zip(sources, places, entries, strict=True):
                file.write(bytes(place_at - file.tell()))
                for data in _bytes_of(reader, source):
                    file.write(data.data)
                if file.tell() - place_at != entry.n_bytes:
                    raise AssertionError(f"{entry.name} takes other bytes than announced")
                if progress is not None:
                    progress(file.tell(), size, "writing")
            file.write(bytes(size - file.tell()))
    except OSError as error:
        raise HeadraceError(f"cannot write {target}: {error.strerror or error}") from error
    return Compressed(target, model.size_bytes, size)


def _check_target(target: Path, force: bool) -> None:
    if target.is_dir():
        raise HeadraceError(f"{target} is a directory; name the file to write in it")
    if not target.parent.is_dir():
        raise HeadraceError(f"{target.parent} is not a directory; make it first")
    if os.path.lexists(target) and not (force and target.is_file()):
        advice = "use --force to replace it" if target.is_file() else "name another"
        raise HeadraceError(f"{target} exists; {advice}")


def _entries(model: ModelFile) -> tuple[list[Entry], list[PlacedMatrix | TensorInfo]]:
    decoder = describe(model)
    placed = {p.matrix.name: p for p in place(model, decoder, "q8")}
    vectors = {v.name: tensor_of(model, v) for v in decoder.vectors()}
    rest = {n: i for n, i in model.tensors.items() if n not in placed and n not in vectors}
    entries: list[Entry] = []
    sources: list[PlacedMatrix | TensorInfo] = [*vectors.values(), *placed.values(), *rest.values()]
    for source in sources:
        if isinstance(source, PlacedMatrix):
            m, name = source.matrix, source.format.name
            entry = Entry(m.name, tiled_type(name), (m.rows, m.columns), source.n_bytes, name)
        else:
            kept = format_name(source.type)
            entry = Entry(source.name, source.type, source.shape, source.n_bytes, kept)
            if source.type == "I8" and len(source.shape) == 1:
                raise UnsupportedError(
                    "a vector of type I8 would be taken for a tiled matrix; leave it out",
                    path=source.path,
                    tensor=source.name,
                )
        entries.append(entry)
    return entries, sources


def _bytes_of(reader: TensorReader, source: PlacedMatrix | TensorInfo) -> Iterator[np.ndarray]:
    if isinstance(source, PlacedMatrix):
        yield from read_tiled(reader, source)
        return
    for start in range(0, source.n_bytes, _COPY_BYTES):
        raw = np.empty(min(_COPY_BYTES, source.n_bytes - start), np.uint8)
        reader.readinto(source, start, raw)
        yield raw
