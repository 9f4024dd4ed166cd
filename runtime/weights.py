"""Weights in memory: what of them stays, where it lies, loading it tile by tile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.memory import Arena
from headrace.offload.pieces import Piece
from headrace.placing import Placed, PlacedGroups, padded16, streamable, wrong_in
from headrace.rows import raw_rows, read_vector, row_ranges, tile_raw
from headrace.share import share
from headrace.sparse import gqs
from headrace.sparse.format import TILE_ROWS
from headrace.stack import BlockAt, Stack, StackMemory

Progress = Callable[[int, int, str], None]
_Run = tuple[str, int, int]  # a matrix, its first tile, and how many


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


class Weights:
    """The weights of a decoder in memory: tiled matrices, blocks, vectors as padded float32.

    Args:
        model, decoder, placed: what there is.
        kept: pieces to keep of the matrices that are cut; None: keep everything whole. Matrices
            that cannot be streamed are kept whole in any case.
        stack: of the matrices that are stacks of blocks; `keep_blocks` loads them.
        experts: whether those of mixtures are kept, too.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, placed: Sequence[Placed],
        kept: Sequence[Piece] | None = None, stack: Stack | None = None, experts: bool = True,
    ) -> None:  # fmt: skip
        self._model = model
        self._experts = experts
        self.stack = stack
        self._blocks = None if stack is None else StackMemory(stack)
        self.placed = {p.matrix.name: p for p in placed}
        self._decoder = decoder
        self._kept: dict[str, dict[int, _Place]] = {name: {} for name in self.placed}
        self._spare: dict[_Run, _Place] = {}  # given back; may be filled again
        self._heads = _heads_of(self.placed.values())
        self._wanted = self._take(self._runs(kept))
        vectors = {v.key: v for v in decoder.vectors()}
        self._vectors = list(vectors.values())
        self.vectors = Arena({v.key: padded16(v.size) * 4 for v in self._vectors}, huge=False)

    def _runs(self, kept: Sequence[Piece] | None) -> list[_Run]:
        """What is to be in memory: matrices that are not cut, whole, then pieces."""
        embedding = self._decoder.embedding.name
        by_row = kept is not None or not self._experts  # looked up, where something streams
        by_row = by_row and embedding != self._decoder.head.name
        runs = [
            (name, 0, padded16(p.matrix.rows) // TILE_ROWS)
            for name, p in self.placed.items()
            if (kept is None or not streamable(p))
            and not (by_row and name == embedding)
            and (self._experts or not p.expert)
        ]
        return runs + [(piece.matrix, piece.tile, piece.tiles) for piece in kept or ()]

    def _take(self, runs: Sequence[_Run]) -> list[_Place]:
        """Places for runs of tiles, side by side."""
        sizes = {f"{name}:{tile}": self._run_bytes(name, tile, n) for name, tile, n in runs}
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
        addresses: dict[str, int], n_threads: int, experts: bool = True,
    ) -> None:  # fmt: skip
        """Keep other pieces than so far: give memory back, or read what is missing.

        Args:
            kept, experts: as in `__init__`; either fewer or more than before.
            cut: all pieces there are.
            reader, addresses, n_threads: to read what is missing, as in `load`.

        Raises:
            ModelFileError: the file cannot be read; what is kept is then as before.
        """
        self._split(cut)
        self._experts = experts
        now = {place.run for places in self._kept.values() for place in places.values()}
        wanted = self._runs(cut if kept is None else kept)
        embedding = self._decoder.embedding
        if kept is None and experts and embedding.name != self._decoder.head.name:
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

    def blocks(self, matrix: str) -> list[BlockAt]:
        """Where the blocks of a matrix of the stack lie that are in memory."""
        return [] if self._blocks is None else self._blocks.blocks(matrix)

    def limit_blocks(self, limits: Mapping[str, int]) -> None:
        """Let `blocks` give no more of a matrix than this."""
        if self._blocks is not None:
            self._blocks.limits = limits

    def keep_blocks(self, count: int, reader: TensorReader) -> None:
        """Keep the first `count` blocks of the stack: read what is missing, or drop the rest.

        Raises:
            ModelFileError: the file cannot be read; all is as before then.
        """
        if self._blocks is not None:
            self._blocks.keep(count, reader)

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
                start = self._run_bytes(name, 0, piece.tile)
                self._kept[name][piece.tile] = replace(
                    whole, tile=piece.tile, tiles=piece.tiles, start=start,
                    n_bytes=self._run_bytes(name, piece.tile, piece.tiles),
                )  # fmt: skip

    def _run_bytes(self, name: str, tile: int, tiles: int) -> int:
        return self.placed[name].run_bytes(tile, tiles)

    def head(self, name: str) -> int:
        """Where the head of a group-sparse matrix lies, as in the file."""
        return self._heads.address(name)

    def parts(self, name: str) -> list[Part]:
        """What is in memory of a matrix, by tile; what lies side by side is one part."""
        parts: list[Part] = []
        for place in sorted(self._kept[name].values(), key=lambda place: place.tile):
            last = parts[-1] if parts else None
            if (
                last is not None
                and last.tile + last.tiles == place.tile
                and last.address + self._run_bytes(name, last.tile, last.tiles) == place.address
            ):
                parts[-1] = Part(last.tile, last.tiles + place.tiles, last.address)
            else:
                parts.append(Part(place.tile, place.tiles, place.address))
        return parts

    def load(
        self, reader: TensorReader, addresses: dict[str, int], n_threads: int,
        progress: Progress | None = None, only: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        """Read and tile what is kept; each thread holds one piece of the file at a time.

        Args:
            reader: of the model's files.
            addresses: kernels by name; `tile_<format>` for each format in use.
            only: these matrices; others stay zeros that take no memory. None: all.

        Raises:
            ModelFileError: the file cannot be read to the end.
        """
        for vector in self._vectors:
            floats = read_vector(self._model, reader, vector)
            self.vectors.view(vector.key, "f4")[: vector.size] = floats
        places = [p for p in self._wanted if only is None or p.matrix in only]
        self._fill(reader, places, addresses, n_threads, progress)
        self._wanted = []

    def fill_with_nothing(self, blocks: int = 0) -> None:
        """Zeros instead of what the file has, in memory that is really there; vectors of ones.

        Of a stack there are so many `blocks`, which take no memory: to read it is not what binds.
        """
        if self._blocks is not None:
            self._blocks.count = blocks
        for place in self._wanted:
            place.view[:] = 0
        for vector in self._vectors:
            self.vectors.view(vector.key, "f4")[:] = 1

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

        share(jobs, work, n_threads, report)
        if progress is not None:
            progress(total, total, "loading weights")

    def _file_bytes(self, name: str, rows: int) -> int:
        p = self.placed[name]
        return rows * p.info.n_bytes // p.matrix.rows

    def _row_ranges(self, place: _Place) -> list[tuple[int, int]]:
        p = self.placed[place.matrix]
        first, last = place.tile * TILE_ROWS, (place.tile + place.tiles) * TILE_ROWS
        return row_ranges(p, first, min(last, p.matrix.rows))

    def _piece(
        self, reader: TensorReader, addresses: dict[str, int], place: _Place, first: int, last: int
    ) -> None:
        placed = self.placed[place.matrix]
        if isinstance(placed, PlacedGroups):
            _read_units(reader, placed, place, first, last)
            return
        fmt, matrix = placed.format, placed.matrix
        at = fmt.tiled_bytes(first - place.tile * TILE_ROWS, matrix.columns)
        n_tiles = -(-(last - first) // TILE_ROWS)
        if placed.straight:
            n_bytes = fmt.tiled_bytes(last - first, matrix.columns)
            here = place.view[at : at + n_bytes]
            reader.readinto(placed.info, fmt.tiled_bytes(first, matrix.columns), here)
            return
        raw = raw_rows(reader, placed, first, last)
        tile_raw(addresses, placed, raw, place.address + at, n_tiles)


def _heads_of(placed: Iterable[Placed]) -> Arena:
    """Where rows of group-sparse matrices begin, and their scales."""
    sparse = [p for p in placed if isinstance(p, PlacedGroups)]
    heads = Arena({p.matrix.name: p.always_bytes for p in sparse}, huge=False)
    for p in sparse:
        head = heads.view(p.matrix.name, "u4")
        head[: len(p.head.first)] = p.head.first
        head[len(p.head.first) :] = p.head.row_scales.view(np.uint32)
    return heads


def _read_units(
    reader: TensorReader, placed: PlacedGroups, place: _Place, first: int, last: int
) -> None:
    """Read the units of some rows to their place, and check them."""
    base = placed.unit_at(place.tile * TILE_ROWS)
    at, end = placed.unit_at(first), placed.unit_at(last)
    here = place.view[at - base : end - base]
    reader.readinto(placed.info, placed.units_offset + at, here)
    rows = placed.head.first[first : last + 1]
    group, begin = placed.format.group, placed.units_offset + at
    gqs.check_units(here, rows, placed.matrix.columns, group, begin, wrong_in(placed.info))
