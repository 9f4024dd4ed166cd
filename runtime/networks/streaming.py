"""A network's weights that are read from files while it runs, and those of them that stay."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from headrace.loaders.model_file import TensorInfo
from headrace.loaders.onnx_model import OnnxModel
from headrace.loaders.progress import Progress
from headrace.memory import Arena, give_back_heap
from headrace.networks.engine import Engine
from headrace.networks.needs import Needs, NetworkMemory, Rows, Streamable
from headrace.networks.operation import Operation
from headrace.networks.packed_file import PackedFile
from headrace.offload import flash, requests
from headrace.offload.files import close_all, open_streamed, reader_of, stamp_of
from headrace.offload.modes import MODES, FlashRate, ReadMode, Work, choose
from headrace.offload.pieces import Piece
from headrace.offload.revision import Revision
from headrace.offload.window import Read, Window
from headrace.team import default_threads

Kept = dict[Any, Arena]  # pieces that stay, by weight, first tile and tiles


class TilesAt(NamedTuple):
    """Tiles of a weight, and the number of the read that brings them; None: they are there."""

    first: int
    tiles: int
    address: int
    request: int | None


def packed_of(needs: Needs, model: OnnxModel, target: str) -> PackedFile | None:
    """The file that what may stream of a plan is read from; None: the model's own will do."""
    weights = {one.weight.key: one.weight for one in needs.streamable}
    weights |= {one.weight.key: one.weight for one in needs.tables if one.weight.place is None}
    return PackedFile(model, weights, target) if weights else None


def reads_of(
    streamable: list[Streamable], pieces: tuple[Piece, ...], places: Mapping[Any, TensorInfo]
) -> list[Read]:
    """Where pieces lie."""
    found = []
    for piece in pieces:
        info = places[streamable[int(piece.matrix)].weight.key]
        found.append(Read(info.path, info.name, info.offset + piece.start, piece.read_bytes))
    return found


class NetworkStreaming:
    """What is read for a plan's runs.

    Args:
        needs: of the plan.
        memory: what was decided.
        engine: kernels.
        model: the network's file.
        rates: of the ways to read; empty: they are measured, and put there.
        kept: pieces of plans before, which become those of this one.
        progress: of packing.

    Raises:
        HeadraceError: packed weights cannot be written, or files cannot be read.
        BudgetError: the system gives no memory.
    """

    def __init__(
        self, needs: Needs, memory: NetworkMemory, engine: Engine, model: OnnxModel,
        rates: dict[ReadMode, FlashRate], kept: Kept, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.memory = memory
        self._threads = engine.threads
        residency = memory.residency
        with_pieces = needs if residency is not None else replace(needs, streamable=[])
        packed = packed_of(with_pieces, model, engine.target.name)
        if packed is not None and not packed.is_whole():
            kept.clear()  # of plans of other shapes: packing wants their room
            packed.write(progress)
            give_back_heap()  # what packing took comes before what stays
        self._places = {} if packed is None else dict(packed.places)
        paths = dict.fromkeys(info.path for info in self._places.values())
        if memory.from_file:
            for one in needs.tables:
                if one.weight.place is not None:
                    self._places[one.weight.key] = one.weight.place
                    paths[one.weight.place.path] = None
        self._files = open_streamed({path: stamp_of(path) for path in paths})
        self.window: Window | None = None
        try:
            self._reader = reader_of(self._files)
            self._parts: dict[tuple[int, str], list[TilesAt]] = {}
            if residency is not None:
                self._stream(list(needs.streamable), residency.streamed, engine, rates)
                self._keep(list(needs.streamable), residency.kept, kept)
            tables = needs.tables if memory.from_file else ()
            self._tables = {id(one.operation.weights): _TableRows(one) for one in tables}
        except BaseException:
            self.close()
            raise

    def _stream(
        self, streamable: list[Streamable], pieces: tuple[Piece, ...], engine: Engine,
        rates: dict[ReadMode, FlashRate],
    ) -> None:  # fmt: skip
        residency = self.memory.residency
        assert residency is not None
        reader = engine.addresses_of([requests.kernel()])["window_read"]
        reads = reads_of(streamable, pieces, self._places)
        if not rates:
            rates |= flash.measure(self._files, reads, residency.slot_bytes, reader)
        self._revision = Revision(rates)
        self._rates: Mapping[ReadMode, FlashRate] = rates
        self._compute_s = 0.0
        self.window = Window(
            reads, residency.slots, residency.slot_bytes, reader, MODES[0], self._files
        )
        for i, piece in enumerate(pieces):
            self._add(streamable, piece, self.window.address(i), i)

    def _keep(self, streamable: list[Streamable], pieces: tuple[Piece, ...], kept: Kept) -> None:
        keys = [(streamable[int(p.matrix)].weight.key, p.tile, p.tiles) for p in pieces]
        for key in kept.keys() - set(keys):  # before others come
            del kept[key]
        for key, piece in zip(keys, pieces, strict=True):
            if key not in kept:
                info = self._places[key[0]]
                arena = Arena({"piece": piece.read_bytes}, huge=False)
                self._reader.readinto(info, piece.start, arena.view("piece"))
                self._files[info.path].forget_cached(info.offset + piece.start, piece.read_bytes)
                kept[key] = arena
            self._add(streamable, piece, kept[key].base, None)

    def _add(
        self, streamable: list[Streamable], piece: Piece, address: int, request: int | None
    ) -> None:
        one = streamable[int(piece.matrix)]
        found = self._parts.setdefault((id(one.operation.weights), one.name), [])
        found.append(TilesAt(*one.tiles_of(piece), address, request))

    def parts(self, operation: Operation, name: str) -> list[TilesAt] | None:
        """Where the tiles of an operation's weight are, in order; None: it is not among these."""
        found = self._parts.get((id(operation.weights), name))
        return None if found is None else sorted(found)

    def rows(self, operation: Operation) -> dict[str, int] | None:
        """Addresses of the rows that an operation takes, and of what stands for their ids."""
        found = self._tables.get(id(operation.weights))
        return None if found is None else found.addresses

    def fetch(self, operation: Operation, values: Mapping[str, np.ndarray]) -> None:
        """Bring the rows that ids choose, which have been checked.

        Raises:
            ModelFileError: the file has changed, or cannot be read.
        """
        rows = self._tables.get(id(operation.weights))
        if rows is None:
            return
        info = self._places[rows.key]
        self._files[info.path].check()
        ids, row_bytes = values[rows.table.ids].reshape(-1), rows.table.row_bytes
        chosen, numbers = np.unique(ids % rows.table.entries, return_inverse=True)
        for i, at in enumerate(chosen.tolist()):
            self._reader.readinto(info, at * row_bytes, rows.found[i])
        rows.say(numbers.astype(ids.dtype))

    # --- runs -------------------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """Of the window, for the native loop; 0: there is none."""
        return self._address if self.window is not None else 0

    def begin(self) -> None:
        """Begin a run.

        Raises:
            ModelFileError: a file has changed, or could not be read.
        """
        if self.window is None:
            return
        work = Work(self.memory.streamed_bytes, self._compute_s, self._threads, default_threads())
        self._address = self.window.begin(choose(self._rates, work))
        self._began, self._stalled_s = time.perf_counter(), self.window.flow.stall_s

    def end(self, finished: bool) -> None:
        """End a run.

        Raises:
            ModelFileError: it stopped because a read failed.
        """
        if self.window is None:
            return
        seconds = time.perf_counter() - self._began
        self.window.end(finished)
        if not finished:
            return
        stall_s = self.window.flow.stall_s - self._stalled_s
        self._compute_s = seconds - stall_s
        assert self.memory.residency is not None
        n_bytes = self.memory.residency.streamed_bytes
        if self._revision.add(self.window.mode, n_bytes, seconds, stall_s):
            self._rates = self._revision.rates

    @property
    def stall_s(self) -> float:
        """Seconds that runs have waited."""
        return 0.0 if self.window is None else self.window.flow.stall_s

    def halt(self) -> None:
        """End the readers until the next run begins."""
        if self.window is not None:
            self.window.halt()

    def close(self) -> None:
        """End the readers, close the files, give the memory back; pieces that stay are others'."""
        if self.window is not None:
            self.window.close()
            self.window = None
        close_all(self._files.values())


class _TableRows:
    """Room for rows of a table, and for what stands for ids then."""

    def __init__(self, of: Rows) -> None:
        self.table, self.key = of.table, of.weight.key
        count = of.count
        sizes = {"rows": count * of.table.row_bytes, "ids": 8 * of.table.rows}
        self._arena = Arena(sizes, huge=False)
        self.found = self._arena.view("rows").reshape(count, of.table.row_bytes)
        self.addresses = {
            of.table.weight: self._arena.address("rows"), "ids": self._arena.address("ids"),
        }  # fmt: skip

    def say(self, numbers: np.ndarray) -> None:
        """Of each id, which of the rows it is."""
        data = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
        self._arena.view("ids")[: data.size] = data
