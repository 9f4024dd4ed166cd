"""Write a model whose layers are stacks of blocks: see `headrace.stack`."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np

from headrace.atomic_file import whole_file
from headrace.errors import HeadraceError, UnsupportedError
from headrace.families import describe
from headrace.families.decoder import Decoder, Matrix, tensor_of
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.sources import resolve
from headrace.loaders.tiled import Entry, build_header, format_name, open_model, tiled_type
from headrace.placing import PlacedMatrix, dense, place
from headrace.recipe import ENDS, ENOUGH_BITS
from headrace.rounding import Inputs
from headrace.rows import raw_rows, read_tiled
from headrace.share import share
from headrace.sparse.bitstack import LEVELS, RANKS, BlockShape, decompose, pack, rank_for
from headrace.sparse.registry import FORMATS
from headrace.stack import block_format, block_name

Progress = Callable[[int, int | None, str], None]

STACK = "bitstack"  # what it is called among the formats that a file may get
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class _Made:
    """A block in the spill file, and by how much it lessens the error of its matrix's output."""

    matrix: Matrix
    level: int
    index: int  # of the matrix in a pass
    offset: int
    n_bytes: int
    gain: float


_Source: TypeAlias = PlacedMatrix | TensorInfo | _Made


def write_stack(
    src: str | Path,
    dst: str | Path,
    *,
    rank: int | None = None,
    levels: int = LEVELS,
    inputs: Callable[[str], Inputs | None] | None = None,
    n_threads: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write the matrices of a model's layers as stacks; embedding, head and vectors stay whole.

    Each thread has one matrix in memory; blocks wait on the disk until their order is known. The
    first blocks of all matrices come first, in the order of a pass. Within each level after that
    come those first that take most from the error of their matrix's output: of its square on the
    inputs' text, as a part of that of the output.

    Args:
        src: whatever `headrace.load` takes.
        dst: the file to write; one of that name is replaced.
        rank: vectors of a block; default: what suits the model's width.
        levels: blocks of a matrix.
        inputs: what the inputs of a matrix were like on some text, by its name; called in the
            order of a pass. Without it all inputs count the same.
        n_threads: that decompose, a matrix each.
        progress: called with (done, total, what).

    Raises:
        UnsupportedError: the model cannot run, or is a stack itself.
        ModelNotFoundError, DownloadError, ModelFileError: no usable source.
        HeadraceError: `dst` cannot be written.
        ValueError: `rank` or `levels` is none that there is.
    """
    if levels < 1 or levels > LEVELS:
        raise ValueError(f"levels must lie in 1..{LEVELS}, not {levels}")
    if rank is not None and rank not in RANKS:
        raise ValueError(f"rank must be one of {', '.join(map(str, RANKS))}, not {rank}")
    target = Path(os.path.expanduser(dst))
    model = open_model(resolve(src, progress=progress))
    decoder = describe(model)
    if block_name(decoder.layers[0].attention.query.name, 0) in model.tensors:
        raise UnsupportedError("is a stack already: take its source", path=model.paths[0])
    placed = [dense(p) for p in place(model, decoder, "q8")]
    vectors = rank or rank_for(decoder.width)
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(TensorReader())
            spill = stack.enter_context(tempfile.TemporaryFile(dir=target.parent))
            stacked = [p for p in placed if _stackable(p.matrix, decoder)]
            blocks = _decomposed(
                stacked, reader, spill, vectors, levels, inputs, n_threads, progress
            )
            entries, sources = _entries(model, decoder, placed, blocks, vectors)
            header, places, size = build_header(model, entries)
            file = stack.enter_context(whole_file(target))
            file.write(header)
            for entry, at, source in zip(entries, places, sources, strict=True):
                file.write(bytes(at - file.tell()))
                for data in _bytes_of(source, reader, spill):
                    file.write(data)
                if file.tell() - at != entry.n_bytes:
                    raise AssertionError(f"{entry.name} takes other bytes than announced")
                if progress is not None:
                    progress(file.tell(), size, "writing")
            file.write(bytes(size - file.tell()))
    except OSError as error:
        raise HeadraceError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _stackable(matrix: Matrix, decoder: Decoder) -> bool:
    """Whether a matrix becomes a stack: those of layers, whose inputs are a multiple of 32."""
    return matrix.name not in _ends(decoder) and matrix.columns % 32 == 0


def _ends(decoder: Decoder) -> tuple[str, str]:
    return decoder.embedding.name, decoder.head.name


def _smaller(placed: PlacedMatrix) -> PlacedMatrix:
    """An embedding or a head as other compressed files have it."""
    fmt = FORMATS[ENDS]
    if placed.format.bits_per_weight <= ENOUGH_BITS or placed.matrix.columns % fmt.block:
        return placed
    return replace(placed, format=fmt)


def _decomposed(
    stacked: list[PlacedMatrix], reader: TensorReader, spill: IO[bytes], rank: int, levels: int,
    inputs: Callable[[str], Inputs | None] | None, n_threads: int, progress: Progress | None,
) -> list[_Made]:  # fmt: skip
    made: list[_Made] = []
    done, lock = 0, threading.Lock()

    def work(job: tuple[int, PlacedMatrix, Inputs | None]) -> None:
        nonlocal done
        index, p, found = job
        m = p.matrix
        w = p.format.decode(raw_rows(reader, p, 0, m.rows))[: m.rows]
        scale = None if found is None else _usable(np.sqrt(found.importance))
        products = None if found is None or scale is None else found.h / np.outer(scale, scale)
        before = size = _error(w if scale is None else w * scale, products)
        for level, (block, left) in enumerate(decompose(w, rank, levels, scale)):
            raw, after = pack(block), _error(left, products)
            with lock:
                gain = (before - after) / max(size, 1e-30)
                made.append(_Made(m, level, index, spill.tell(), len(raw), gain))
                spill.write(raw.data)
            before = after
        done += 1

    def report() -> None:
        if progress is not None:
            progress(done, len(stacked), "decomposing")

    # `share` takes one job at a time, so that inputs are asked for in the order of a pass.
    jobs = (
        (i, p, None if inputs is None else inputs(p.matrix.name)) for i, p in enumerate(stacked)
    )
    share(jobs, work, n_threads, report)
    return sorted(made, key=lambda one: (one.level, -one.gain if one.level else 0.0, one.index))


def _error(left: np.ndarray, products: np.ndarray | None) -> float:
    """The square of what weights add to an output, for inputs with these sums of products."""
    return float((left * (left if products is None else left @ products)).sum(dtype=np.float64))


def _usable(scale: np.ndarray) -> np.ndarray:
    """Scales around 1, none of them so near 0 that 1 / scale says nothing in float16."""
    scale = np.maximum(scale.astype(np.float32), 1e-3 * float(scale.mean()) + 1e-12)
    usable: np.ndarray = scale / np.exp(np.log(scale).mean())
    return usable


def _entries(
    model: ModelFile, decoder: Decoder, placed: list[PlacedMatrix], blocks: list[_Made], rank: int
) -> tuple[list[Entry], list[_Source]]:
    whole = {
        p.matrix.name: _smaller(p) if p.matrix.name in _ends(decoder) else p
        for p in placed
        if not _stackable(p.matrix, decoder)
    }
    vectors = {v.name: tensor_of(model, v) for v in decoder.vectors()}
    gone = {one.matrix.name for one in blocks}
    rest = [
        info
        for name, info in model.tensors.items()
        if name not in whole and name not in vectors and name not in gone
    ]
    sources: list[_Source] = [*vectors.values(), *whole.values(), *rest, *blocks]
    return [_entry(source, rank) for source in sources], sources


def _entry(source: _Source, rank: int) -> Entry:
    if isinstance(source, TensorInfo):
        kept = format_name(source.type)
        return Entry(source.name, source.type, source.shape, source.n_bytes, kept)
    m = source.matrix
    if isinstance(source, PlacedMatrix):
        name = source.format.name
        return Entry(m.name, tiled_type(name), (m.rows, m.columns), source.n_bytes, name)
    assert source.n_bytes == BlockShape(m.rows, m.columns, rank).n_bytes
    name, kind = block_name(m.name, source.level), block_format(rank)
    return Entry(name, tiled_type(kind), (m.rows, m.columns), source.n_bytes, kind)


def _bytes_of(
    source: _Source, reader: TensorReader, spill: IO[bytes]
) -> Iterator[bytes | memoryview]:
    if isinstance(source, PlacedMatrix):
        for data in read_tiled(reader, source):
            yield data.data
    elif isinstance(source, _Made):
        spill.seek(source.offset)
        yield spill.read(source.n_bytes)
    else:
        for start in range(0, source.n_bytes, _COPY_BYTES):
            raw = np.empty(min(_COPY_BYTES, source.n_bytes - start), np.uint8)
            reader.readinto(source, start, raw)
            yield raw.data
