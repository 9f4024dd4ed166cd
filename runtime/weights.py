"""Weights in memory: which format each tensor gets, how many bytes, loading them tile by tile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families.decoder import Decoder, Matrix, Vector, tensor_of
from headrace.interruptible import persist
from headrace.kernels.invoke import invoke
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import format_name
from headrace.memory import Arena
from headrace.offload.pieces import Cuttable, Piece, cut
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


_J = TypeVar("_J")


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


def streamable(placed: PlacedMatrix) -> bool:
    """Whether native code alone can bring it from the file into the form that kernels read."""
    return not placed.expanded


def pieces_of(placed: Iterable[PlacedMatrix]) -> list[Piece]:
    """What of these may be streamed, cut into pieces."""
    return cut([_cuttable(p) for p in placed if streamable(p)])


def _cuttable(p: PlacedMatrix) -> Cuttable:
    kept = p.format.tiled_bytes(TILE_ROWS, p.matrix.columns)
    row_bytes = p.info.n_bytes // p.matrix.rows
    read = kept if p.straight else row_bytes * TILE_ROWS
    n_tiles = padded16(p.matrix.rows) // TILE_ROWS
    return Cuttable(p.matrix.name, n_tiles, read, kept, p.info.n_bytes, p.straight)


@dataclass(frozen=True)
class Part:
    """Consecutive tiles of a matrix, one step's work: at `address` in memory, or to be streamed.

    Attributes:
        request: number of the read that brings them, None if they are in memory.
        row_bytes: of raw rows that must be tiled first; 0 if `address` has tiles.
    """

    tile: int
    tiles: int
    address: int
    request: int | None = None
    row_bytes: int = 0


class Weights:
    """The weights of a decoder in memory: tiled matrices, and vectors as padded float32.

    Args:
        model, decoder, placed: what there is.
        kept: pieces to keep of the matrices that are cut; None: keep everything whole. Matrices
            that cannot be streamed are kept whole in any case.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, placed: list[PlacedMatrix],
        kept: Sequence[Piece] | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self.placed = {p.matrix.name: p for p in placed}
        self._decoder = decoder
        self._kept: dict[str, dict[int, _Place]] = {name: {} for name in self.placed}
        self._spare: dict[tuple[str, int, int], _Place] = {}  # given back; may be filled again
        self._wanted = self._take(self._runs(kept))
        vectors = {v.name: v for v in decoder.vectors()}
        self._vectors = list(vectors.values())
        self.vectors = Arena({v.name: padded16(v.size) * 4 for v in self._vectors}, huge=False)

    def _runs(self, kept: Sequence[Piece] | None) -> list[_Run]:
        """What is to be in memory: matrices that are not cut, whole, then pieces."""
        embedding = self._decoder.embedding.name
        by_row = kept is not None and embedding != self._decoder.head.name
        runs = [
            (name, 0, padded16(p.matrix.rows) // TILE_ROWS)
            for name, p in self.placed.items()
            if (kept is None or not streamable(p)) and not (by_row and name == embedding)
        ]
        return runs + [(piece.matrix, piece.tile, piece.tiles) for piece in kept or ()]

    def _take(self, runs: Sequence[_Run]) -> list[_Place]:
        """Places for runs of tiles, side by side."""
        sizes = {f"{name}:{tile}": self._run_bytes(name, tiles) for name, tile, tiles in runs}
        arena = Arena(sizes)
        taken = []
        for run in runs:
            key = f"{run[0]}:{run[1]}"
            taken.append(_Place(*run, arena, key, 0, sizes[key]))
        for place in taken:
            self._kept[place.matrix][place.tile] = place
        return taken

    def change(
        self, kept: Sequence[Piece] | None, cut: Sequence[Piece], reader: TensorReader,
        addresses: dict[str, int], n_threads: int,
    ) -> None:  # fmt: skip
        """Keep other pieces than so far: give memory back, or read what is missing.

        Args:
            kept: as in `__init__`; either fewer or more than before.
            cut: all pieces there are.
            reader, addresses, n_threads: to read what is missing, as in `load`.

        Raises:
            ModelFileError: the file cannot be read; what is kept is then as before.
        """
        self._split(cut)
        now = {place.run for places in self._kept.values() for place in places.values()}
        wanted = self._runs(cut if kept is None else kept)
        embedding = self._decoder.embedding
        if kept is None and embedding.name != self._decoder.head.name:
            wanted.append((embedding.name, 0, padded16(embedding.rows) // TILE_ROWS))
        for run in now.difference(wanted):
            place = self._kept[run[0]].pop(run[1])
            place.give_back()
            self._spare[run] = place
        missing = [run for run in wanted if run not in now]
        new = [self._spare.pop(run) for run in missing if run in self._spare]
        for place in new:
            self._kept[place.matrix][place.tile] = place
        there = {place.run for place in new}
        new += self._take([run for run in missing if run not in there])
        try:
            self._fill(reader, new, addresses, n_threads, None)
        except BaseException:
            for place in new:
                del self._kept[place.matrix][place.tile]
                place.give_back()
                self._spare[place.run] = place
            raise

    def _split(self, cut: Sequence[Piece]) -> None:
        """Cut whole matrices in memory where pieces begin."""
        by_matrix: dict[str, list[Piece]] = {}
        for piece in cut:
            by_matrix.setdefault(piece.matrix, []).append(piece)
        for name, pieces in by_matrix.items():
            whole = self._kept[name].get(0)
            if whole is None or whole.tiles == pieces[0].tiles:
                continue
            for piece in pieces:
                start = self._run_bytes(name, piece.tile)
                self._kept[name][piece.tile] = replace(
                    whole, tile=piece.tile, tiles=piece.tiles, start=start,
                    n_bytes=self._run_bytes(name, piece.tiles),
                )  # fmt: skip

    def _run_bytes(self, name: str, tiles: int) -> int:
        p = self.placed[name]
        return p.format.tiled_bytes(tiles * TILE_ROWS, p.matrix.columns)

    def parts(self, name: str) -> list[Part]:
        """What is in memory of a matrix, by tile; what lies side by side is one part."""
        parts: list[Part] = []
        for place in sorted(self._kept[name].values(), key=lambda place: place.tile):
            last = parts[-1] if parts else None
            if (
                last is not None
                and last.tile + last.tiles == place.tile
                and last.address + self._run_bytes(name, last.tiles) == place.address
            ):
                parts[-1] = Part(last.tile, last.tiles + place.tiles, last.address)
            else:
                parts.append(Part(place.tile, place.tiles, place.address))
        return parts

    def load(
        self, addresses: dict[str, int], n_threads: int, progress: Progress | None = None
    ) -> None:
        """Read and tile what is kept; each thread holds one piece of the file at a time.

        Args:
            addresses: kernels by name; `tile_<format>` for each format in use.

        Raises:
            ModelFileError: the file cannot be read to the end.
        """
        with TensorReader() as reader:
            for vector in self._vectors:
                floats = read_vector(self._model, reader, vector)
                self.vectors.view(vector.name, "f4")[: vector.size] = floats
            self._fill(reader, self._wanted, addresses, n_threads, progress)
        self._wanted = []

    def fill_with_nothing(self) -> None:
        """Zeros instead of what the file has, in memory that is really there; vectors of ones."""
        for place in self._wanted:
            place.view[:] = 0
        for vector in self._vectors:
            self.vectors.view(vector.name, "f4")[:] = 1

    def _fill(
        self, reader: TensorReader, places: Sequence[_Place], addresses: dict[str, int],
        n_threads: int, progress: Progress | None,
    ) -> None:  # fmt: skip
        jobs = [(place, *rows) for place in places for rows in self._row_ranges(place)]
        total = sum(self._file_bytes(place.matrix, last - first) for place, first, last in jobs)
        done, lock = 0, threading.Lock()

        def work(job: tuple[_Place, int, int]) -> None:
            nonlocal done
            place, first, last = job
            self._piece(reader, addresses, place, first, last)
            with lock:
                done += self._file_bytes(place.matrix, last - first)

        def report() -> None:
            if progress is not None:
                progress(min(done, total), total, "loading weights")

        _share(jobs, work, n_threads, report)
        if progress is not None:
            progress(total, total, "loading weights")

    def _file_bytes(self, name: str, rows: int) -> int:
        p = self.placed[name]
        return rows * p.info.n_bytes // p.matrix.rows

    def _row_ranges(self, place: _Place) -> list[tuple[int, int]]:
        p = self.placed[place.matrix]
        first, last = place.tile * TILE_ROWS, (place.tile + place.tiles) * TILE_ROWS
        return _row_ranges(p, first, min(last, p.matrix.rows))

    def _piece(
        self, reader: TensorReader, addresses: dict[str, int], place: _Place, first: int, last: int
    ) -> None:
        placed = self.placed[place.matrix]
        fmt, matrix = placed.format, placed.matrix
        at = fmt.tiled_bytes(first - place.tile * TILE_ROWS, matrix.columns)
        n_tiles = -(-(last - first) // TILE_ROWS)
        if placed.straight:
            n_bytes = fmt.tiled_bytes(last - first, matrix.columns)
            here = place.view[at : at + n_bytes]
            reader.readinto(placed.info, fmt.tiled_bytes(first, matrix.columns), here)
            return
        raw = _raw_rows(reader, placed, first, last)
        tile_raw(addresses, placed, raw, place.address + at, n_tiles)


_Run = tuple[str, int, int]  # a matrix, its first tile, and how many


@dataclass(frozen=True)
class _Place:
    """Memory of a run of tiles: `n_bytes` from `start` of a piece of an arena."""

    matrix: str
    tile: int
    tiles: int
    arena: Arena
    key: str
    start: int
    n_bytes: int

    @property
    def run(self) -> _Run:
        """What it has."""
        return self.matrix, self.tile, self.tiles

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.arena.address(self.key) + self.start

    @property
    def view(self) -> np.ndarray:
        """Its bytes."""
        return self.arena.view(self.key)[self.start : self.start + self.n_bytes]

    def give_back(self) -> None:
        """Give its memory back to the system."""
        self.arena.release(self.key, self.start, self.n_bytes)


def tile_raw(
    addresses: dict[str, int], placed: PlacedMatrix, raw: np.ndarray, to: int, n_tiles: int
) -> None:
    """Tile raw rows [16 * n_tiles, bytes] to an address."""
    n_blocks = placed.matrix.columns // placed.format.block
    invoke(addresses[f"tile_{placed.format.name}"], [raw, raw.shape[1], to, n_blocks, n_tiles])


def raw_row(reader: TensorReader, placed: PlacedMatrix, row: int) -> np.ndarray:
    """The bytes of one row in the form that the kernel which tiles takes."""
    if tiled_format(placed.info) is None:
        return _raw_rows(reader, placed, row, row + 1)[0]
    first = row // TILE_ROWS * TILE_ROWS  # a tiled file has whole tiles only
    if not placed.straight:
        last = min(first + TILE_ROWS, placed.matrix.rows)
        return _raw_rows(reader, placed, first, last)[row - first]
    fmt, columns = placed.format, placed.matrix.columns
    tiled = np.empty((1, columns // fmt.block, fmt.tile_block_bytes), np.uint8)
    reader.readinto(placed.info, fmt.tiled_bytes(first, columns), tiled)
    return fmt.untile(tiled, TILE_ROWS)[row - first]


def read_vector(model: ModelFile, reader: TensorReader, vector: Vector) -> np.ndarray:
    """A vector of the file: float32 [size]."""
    info = tensor_of(model, vector)
    raw = np.empty(info.n_bytes, np.uint8)
    reader.readinto(info, 0, raw)
    return _as_floats(raw[None], info.type)[0]


def read_tiled(reader: TensorReader, placed: PlacedMatrix) -> Iterator[np.ndarray]:
    """The tiled bytes of a matrix piece by piece, made without kernels."""
    fmt, columns = placed.format, placed.matrix.columns
    for first, last in _row_ranges(placed, 0, placed.matrix.rows):
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


def _row_ranges(placed: PlacedMatrix, begin: int, end: int) -> list[tuple[int, int]]:
    row_bytes = max(1, placed.info.n_bytes // placed.matrix.rows)
    piece = STRAIGHT_BYTES if placed.straight else PIECE_BYTES
    step = max(TILE_ROWS, piece // row_bytes // TILE_ROWS * TILE_ROWS)
    return [(first, min(first + step, end)) for first in range(begin, end, step)]


def _share(
    jobs: Iterable[_J], work: Callable[[_J], None], n_threads: int, report: Callable[[], None]
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
