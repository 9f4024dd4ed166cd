"""Weights in memory: which format each tensor gets, how many bytes, loading them tile by tile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families.decoder import Decoder, Matrix, Vector, tensor_of
from headrace.interruptible import persist
from headrace.kernels.invoke import invoke
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import format_name
from headrace.memory import Arena
from headrace.sparse import linear
from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.registry import FORMATS, by_ggml_type
from headrace.targets.table import Kernel

Activations = Literal["q8", "f32"]
Progress = Callable[[int, int, str], None]

PIECE_BYTES = 1 << 20  # raw bytes read at a time by each thread
STRAIGHT_BYTES = 4 << 20  # the same, when they go straight to their place


def padded16(n: int) -> int:
    """n rounded up to a multiple of 16."""
    return -(-n // 16) * 16


@dataclass(frozen=True)
class PlacedMatrix:
    """A matrix of the file and the format that it has in memory."""

    matrix: Matrix
    info: TensorInfo
    format: Format

    @property
    def n_bytes(self) -> int:
        """Bytes in memory, tiled."""
        return self.format.tiled_bytes(self.matrix.rows, self.matrix.columns)

    @property
    def expanded(self) -> bool:
        """Whether memory holds another coding than the file."""
        return not self.straight and self.format.ggml_type != self.info.type

    @property
    def straight(self) -> bool:
        """Whether the file's bytes are those of memory."""
        return format_name(self.info.type) == self.format.name


def place(model: ModelFile, decoder: Decoder, activations: Activations) -> list[PlacedMatrix]:
    """Choose a format for each matrix, from the header alone, in the order of a pass.

    With activations "f32", a switch for debugging, coded weights are expanded to float32.

    Raises:
        ModelFileError, UnsupportedError: a tensor is missing, misshapen or of an unusable type.
    """
    placed = [_place_one(model, m, activations) for m in decoder.matrices()]
    for vector in decoder.vectors():
        _readable(tensor_of(model, vector))
    return placed


def format_of(info: TensorInfo, activations: Activations = "q8") -> Format:
    """The format that a matrix has in memory, or that a vector is read as.

    Raises:
        ModelFileError, UnsupportedError: its type cannot be used.
    """
    fmt = tiled_format(info) or _readable(info)
    if fmt.activation == "q8" and (activations == "f32" or info.shape[-1] % fmt.block):
        fmt = FORMATS["f32"]
    return fmt


def _readable(info: TensorInfo) -> Format:
    """The format that a tensor of the file is read as, of those that are not tiled."""
    own = by_ggml_type(info.type)
    if own is not None:
        return own
    from headrace.sparse.expand import plan_expansion

    try:
        return plan_expansion(info.type)
    except UnsupportedError as error:
        raise UnsupportedError(
            str(error), path=info.path, tensor=info.name, offset=info.offset
        ) from None


def _place_one(model: ModelFile, matrix: Matrix, activations: Activations) -> PlacedMatrix:
    info = tensor_of(model, matrix)
    return PlacedMatrix(matrix, info, format_of(info, activations))


_Job = tuple[PlacedMatrix, int, int]  # rows of a matrix: the first, and the one after the last


def tiled_format(info: TensorInfo) -> Format | None:
    """The format of a matrix that the file has tiled, its size checked; None if it is not tiled.

    Raises:
        UnsupportedError: there is no such format.
        ModelFileError: the tensor's bytes are not those of a matrix of its shape.
    """
    name = format_name(info.type)
    if name is None:
        return None
    fmt = FORMATS.get(name)
    where: dict[str, Any] = {"path": info.path, "tensor": info.name, "offset": info.offset}
    if fmt is None:
        raise UnsupportedError(
            f"this release has no weight format {name!r}: update Headrace", **where
        )
    rows, columns = info.shape
    if columns % fmt.block or fmt.tiled_bytes(rows, columns) != info.n_bytes:
        raise ModelFileError(
            f"its {info.n_bytes:,} bytes are no {name} matrix of {rows} x {columns}: changed by "
            "another program or corrupt; write the file again",
            **where,
        )
    return fmt


class Weights:
    """All weights of a decoder: tiled matrices in one arena, padded float32 vectors in another."""

    def __init__(self, model: ModelFile, decoder: Decoder, placed: list[PlacedMatrix]) -> None:
        self._model = model
        self.placed = {p.matrix.name: p for p in placed}
        self.matrices = Arena({p.matrix.name: p.n_bytes for p in placed})
        vectors = {v.name: v for v in decoder.vectors()}
        self._vectors = list(vectors.values())
        self.vectors = Arena({v.name: padded16(v.size) * 4 for v in self._vectors}, huge=False)

    def load(
        self, addresses: dict[str, int], n_threads: int, progress: Progress | None = None
    ) -> None:
        """Read and tile everything; each thread holds one piece of the file at a time.

        Args:
            addresses: kernels by name; `tile_<format>` for each format in use.

        Raises:
            ModelFileError: the file cannot be read to the end.
        """
        total = sum(p.info.n_bytes for p in self.placed.values())
        jobs = [job for p in self.placed.values() for job in _pieces(p)]
        done, lock = 0, threading.Lock()
        with TensorReader() as reader:
            for vector in self._vectors:
                floats = read_vector(self._model, reader, vector)
                self.vectors.view(vector.name, "f4")[: vector.size] = floats

            def work(job: _Job) -> None:
                nonlocal done
                placed, first, last = job
                self._piece(reader, addresses, placed, first, last)
                with lock:
                    done += (last - first) * placed.info.n_bytes // placed.matrix.rows

            def report() -> None:
                if progress is not None:
                    progress(min(done, total), total, "loading weights")

            _share(jobs, work, n_threads, report)
        if progress is not None:
            progress(total, total, "loading weights")

    def _piece(
        self,
        reader: TensorReader,
        addresses: dict[str, int],
        placed: PlacedMatrix,
        first: int,
        last: int,
    ) -> None:
        fmt, matrix = placed.format, placed.matrix
        at = first // TILE_ROWS * fmt.tiled_bytes(TILE_ROWS, matrix.columns)
        n_tiles = -(-(last - first) // TILE_ROWS)
        if placed.straight:
            n_bytes = fmt.tiled_bytes(last - first, matrix.columns)
            here = self.matrices.view(matrix.name)[at : at + n_bytes]
            reader.readinto(placed.info, at, here)
            return
        raw = _raw_rows(reader, placed, first, last)
        invoke(
            addresses[f"tile_{fmt.name}"],
            [
                raw,
                raw.shape[1],
                self.matrices.address(matrix.name) + at,
                matrix.columns // fmt.block,
                n_tiles,
            ],
        )


def read_vector(model: ModelFile, reader: TensorReader, vector: Vector) -> np.ndarray:
    """A vector of the file: float32 [size]."""
    info = tensor_of(model, vector)
    raw = np.empty(info.n_bytes, np.uint8)
    reader.readinto(info, 0, raw)
    return _as_floats(raw[None], info.type)[0]


def read_tiled(reader: TensorReader, placed: PlacedMatrix) -> Iterator[np.ndarray]:
    """The tiled bytes of a matrix piece by piece, made without kernels."""
    fmt, columns = placed.format, placed.matrix.columns
    for _, first, last in _pieces(placed):
        if placed.straight:
            data = np.empty(fmt.tiled_bytes(last - first, columns), np.uint8)
            reader.readinto(placed.info, fmt.tiled_bytes(first, columns), data)
            yield data
        else:
            yield fmt.tile(_raw_rows(reader, placed, first, last)).reshape(-1)


def _raw_rows(reader: TensorReader, placed: PlacedMatrix, first: int, last: int) -> np.ndarray:
    """Rows in the raw bytes of the format in memory, filled up to whole tiles with zero bytes."""
    info, fmt = placed.info, placed.format
    rows = last - first
    n_tiles = -(-rows // TILE_ROWS)
    own = tiled_format(info)
    if own is None:
        row_bytes = info.n_bytes // placed.matrix.rows
        raw = np.zeros((n_tiles * TILE_ROWS, row_bytes), np.uint8)
        reader.readinto(info, first * row_bytes, raw[:rows])
        return _expand(raw, info.type, fmt) if placed.expanded else raw
    columns = placed.matrix.columns
    tiled = np.empty((n_tiles, columns // own.block, own.tile_block_bytes), np.uint8)
    reader.readinto(info, own.tiled_bytes(first, columns), tiled)
    return fmt.encode(own.decode(own.untile(tiled, n_tiles * TILE_ROWS)))


def _pieces(placed: PlacedMatrix) -> list[_Job]:
    rows = placed.matrix.rows
    row_bytes = max(1, placed.info.n_bytes // rows)
    piece = STRAIGHT_BYTES if placed.straight else PIECE_BYTES
    step = max(TILE_ROWS, piece // row_bytes // TILE_ROWS * TILE_ROWS)
    return [(placed, first, min(first + step, rows)) for first in range(0, rows, step)]


def _share(
    jobs: Iterable[_Job], work: Callable[[_Job], None], n_threads: int, report: Callable[[], None]
) -> None:
    """Do `work` for each job on `n_threads` threads: this one, which reports as well, and others.

    What goes wrong anywhere is raised here, when no thread is at work any more. (A
    ThreadPoolExecutor would do, but takes 3 ms to import.)
    """
    lock, rest, errors = threading.Lock(), iter(jobs), list[BaseException]()
    at_work: set[int] = set()  # of the others

    def some(after: Callable[[], None]) -> None:
        try:
            while not errors:
                with lock:
                    job = next(rest, None)
                if job is None:
                    return
                work(job)
                after()
        except BaseException as error:
            errors.append(error)

    def other(index: int) -> None:
        at_work.add(index)  # first of all, then `some` looks for errors
        some(lambda: None)
        at_work.discard(index)

    others = [threading.Thread(target=other, args=(i,), daemon=True) for i in range(n_threads - 1)]
    try:
        for thread in others:
            thread.start()
        some(report)
        for thread in others:
            thread.join()
    except BaseException as error:  # Ctrl-C, maybe with a thread half started
        errors.append(error)
        persist(lambda: time.sleep(0.001), lambda: not at_work)
    if errors:
        raise errors[0]


def _as_floats(raw: np.ndarray, ggml_type: str) -> np.ndarray:
    own = by_ggml_type(ggml_type)
    if own is not None:
        return own.decode(raw)
    from headrace.sparse.expand import expand, plan_expansion

    through = plan_expansion(ggml_type)
    return through.decode(expand(raw, ggml_type, through))


def _expand(raw: np.ndarray, ggml_type: str, fmt: Format) -> np.ndarray:
    if fmt.name == "f32":
        return fmt.encode(_as_floats(raw, ggml_type))
    from headrace.sparse.expand import expand

    return np.ascontiguousarray(expand(raw, ggml_type, fmt))


def kernels_for(
    placed: Iterable[PlacedMatrix], embedding: str, operations: Mapping[str, Iterable[str]]
) -> list[Kernel]:
    """The kernels that these weights need, each once; `operations` by kind of activation."""
    found: dict[str, Kernel] = {}
    for p in placed:
        rows = linear.kernels(p.format)
        for operation in operations[p.format.activation]:
            if operation == "tile" and p.straight:
                continue
            found[rows[operation].name] = rows[operation]
        if p.matrix.name == embedding:
            found[rows["rows"].name] = rows["rows"]
    return list(found.values())
