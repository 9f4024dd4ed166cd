"""Memory for some of a model's experts, and native threads that bring the others when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from headrace.loaders.model_file import TensorInfo
from headrace.memory import Arena, aligned_slots
from headrace.offload import expert_store as store
from headrace.offload import requests
from headrace.offload.expert_reads import (
    ExpertMatrix,
    ExpertRead,
    joined,
    landing_bytes,
    pages,
    reads_of,
    rows_at_once,
    slot_offsets,
)
from headrace.offload.files import PAGE, StreamedFile, reader_of
from headrace.offload.modes import ReadMode
from headrace.offload.readers import PATIENCE_PAUSES, Readers, Words, system_functions
from headrace.offload.recall import Predictor, Recall
from headrace.offload.semaphore import Semaphore

# Where passes only wait, predictions are believed that come true so often: what is read in vain
# then costs little. But not where more than this is read in vain for each byte that was of use.
SURE_WAITING, MOST_WASTE = 0.2, 0.2
# Between these shares only what comes true ever more often is believed, up to this: where little
# does, reading ahead ends by itself. As if so many experts had been of use before the first one,
# so that a few bad guesses do not end it.
SURE_WASTING, WASTE_BEGINS, WASTE_ENDS, BENEFIT = 0.85, 0.22, 0.25, 64


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What a cache has been asked for.

    Attributes:
        hits: uses of experts that were there.
        late: uses that waited for an expert that had been asked for ahead.
        misses: uses that asked for an expert themselves.
        ahead: experts that were asked for ahead; `useful` of them were used.
        taken_back: of those that were not, before all of them was read.
        in_vain_bytes: that were read of these.
        slot_bytes: of an expert.
        requests: that readers got, for experts that are read in several goes as well.
        asking_s: that these took the thread that asks.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    ahead: int = 0
    useful: int = 0
    taken_back: int = 0
    in_vain_bytes: int = 0
    slot_bytes: int = 0
    requests: int = 0
    asking_s: float = 0.0

    def and_before(self, before: ExpertCounts | None) -> ExpertCounts:
        """With what a cache of the same experts before this one has been asked for."""
        if before is None:
            return self
        return ExpertCounts(
            self.hits + before.hits, self.late + before.late, self.misses + before.misses,
            self.ahead + before.ahead, self.useful + before.useful,
            self.taken_back + before.taken_back, self.in_vain_bytes + before.in_vain_bytes,
            self.slot_bytes, self.requests + before.requests, self.asking_s + before.asking_s,
        )  # fmt: skip

    def since(self, before: ExpertCounts) -> ExpertCounts:
        """What has come since then."""
        return ExpertCounts(
            self.hits - before.hits, self.late - before.late, self.misses - before.misses,
            self.ahead - before.ahead, self.useful - before.useful,
            self.taken_back - before.taken_back, self.in_vain_bytes - before.in_vain_bytes,
            self.slot_bytes, self.requests - before.requests, self.asking_s - before.asking_s,
        )  # fmt: skip

    @property
    def hit_rate(self) -> float:
        """Share of uses that waited for nothing."""
        return self.hits / max(1, self.hits + self.late + self.misses)

    @property
    def read_bytes(self) -> int:
        """That were read, ahead of time or not."""
        whole = (self.misses + self.ahead - self.taken_back) * self.slot_bytes
        return whole + self.in_vain_bytes

    @property
    def wasted_bytes(self) -> int:
        """That were read ahead for nothing, or have not been used yet."""
        whole = (self.ahead - self.useful - self.taken_back) * self.slot_bytes
        return whole + self.in_vain_bytes


class EarlyRouters(Protocol):
    """Routers in memory: addresses of weights and of bias, by mixture and distance."""

    @property
    def addresses(self) -> Mapping[tuple[int, int], tuple[int, int]]: ...


class ExpertCache:
    """Slots for `n_slots` of a model's experts.

    Args:
        layers: of each mixture its experts, each as its matrices. Slots have
            room for the largest of all.
        n_slots: how many there is room for.
        reader: address of the kernel `experts_read`.
        files: the model's, open; the caller closes them after `close`.
        look_ahead: for how many mixtures experts are predicted, `ranks` of each.
        routers: that say ahead what mixtures will choose.
        predictor: what predicts; `recall` are its tables, if it has any.
        policy: one of those of `headrace.offload.expert_store`.
        shares: of the tokens that take each expert of each layer, if that is known.

    Raises:
        BudgetError: the system gives no memory for the slots.
    """

    def __init__(
        self, layers: Sequence[Sequence[Sequence[ExpertMatrix]]], n_slots: int, reader: int,
        files: Mapping[Path, StreamedFile], look_ahead: int, ranks: int,
        routers: EarlyRouters | None = None,
        policy: int = store.NEXT_USE, predictor: Predictor = "fitted", recall: Recall | None = None,
        shares: Sequence[np.ndarray] = (),
    ) -> None:  # fmt: skip
        placed = [
            [slot_offsets([m.n_bytes for m in expert]) for expert in experts] for experts in layers
        ]
        self._offsets = [[offsets for offsets, _ in experts] for experts in placed]
        self.slot_bytes = max(n_bytes for experts in placed for _, n_bytes in experts)
        self.look_ahead, self.ranks = look_ahead, ranks
        self._routers = routers
        self.predictor, self.recall = predictor, recall
        self.n_slots = n_slots
        self.mode: ReadMode | None = None
        self._files = files
        self._slots = Arena({"slots": n_slots * self.slot_bytes})
        rows_bytes = rows_at_once(self.slot_bytes)
        self._reads: list[ExpertRead] = []
        n_experts = sum(map(len, layers))
        self.first = np.cumsum([0, *map(len, layers)]).tolist()
        self._experts = aligned_slots(n_experts * store.EXPERT_WORDS)
        table = self._experts.reshape(-1, store.EXPERT_WORDS)
        for layer, experts in enumerate(layers):
            for i, expert in enumerate(experts):
                offsets, _ = placed[layer][i]
                first = store.PARTS - len(expert)
                some = joined([
                    r for part, (m, to) in enumerate(zip(expert, offsets, strict=True), first)
                    for r in reads_of(m, to, part, rows_bytes)
                ])  # fmt: skip
                row = table[self.first[layer] + i]
                row[store.FIRST_READ], row[store.N_READS] = len(self._reads), len(some)
                row[store.LAYER], row[store.WHOLE] = layer, sum(r.parts for r in some)
                row[store.STATE] = store.ABSENT if some else store.NOTHING
                usual = ranks / len(experts) if not len(shares) else shares[layer][i]
                row[store.SHARE] = int(store.ALWAYS * usual)
                self._reads += some
        self._table = aligned_slots(len(self._reads) * store.READ_WORDS)
        self._places = aligned_slots(n_slots * store.SLOT_WORDS).reshape(-1, store.SLOT_WORDS)
        self._places[:, store.ADDRESS] = self._slots.base + np.arange(n_slots) * self.slot_bytes
        self._places[:, store.EXPERT] = -1
        self._rings = np.zeros((2, store.RING), np.int64)
        self.words = aligned_slots(store.STORE_WORDS)
        self.words[store.EXPERTS] = self._experts.ctypes.data
        self.words[store.SLOTS] = self._places.ctypes.data
        self.words[store.N_SLOTS] = n_slots
        self.words[store.READS] = self._table.ctypes.data
        self.words[store.POLICY] = policy
        self.words[store.LAYERS] = len(layers)
        self.words[store.SURE] = int(store.SURE_ENOUGH * store.ALWAYS)
        self.words[store.DEMANDS] = self._rings[0].ctypes.data
        self.words[store.AHEAD] = self._rings[1].ctypes.data
        words = Words(self.words, store.STOP, store.FAILED, store.OWN_READ)
        self._readers = Readers(reader, words, self._read_again, "headrace-expert")
        # Buffers of readers for rows that are tiled: on huge pages, as slots of a window are.
        self._landing = Arena({})
        self.predictions = np.zeros(
            (len(layers), look_ahead, store.prediction_words(ranks)), np.int64
        )
        # Until some have come true none is believed.
        self.predictions[..., store.TRUE : store.TRUE + store.CLASSES] = store.ALWAYS // 2
        self._plainly = reader_of(files)
        self.mended_reads = 0
        self.stall_s = 0.0  # that passes have waited for experts
        self._asking_s = 0.0
        # What a native loop writes how long it took to, where nothing else streams.
        self._span = aligned_slots(requests.WINDOW_SLOTS)

    @property
    def address(self) -> int:
        """Of the store, for steps of a plan."""
        return int(self.words.ctypes.data)

    def router_ahead(self, mixture: int, distance: int) -> tuple[int, int] | None:
        """Addresses of what says ahead what a mixture will choose; None: there is nothing."""
        return None if self._routers is None else self._routers.addresses.get((mixture, distance))

    def predictions_address(self, mixture: int, distance: int) -> int:
        """Of what is predicted for a mixture, so many mixtures before it; those of distance 1 come
        first, and all others of it behind them (`headrace.kernels.expert_cache`).
        """
        return int(self.predictions[mixture, distance - 1].ctypes.data)

    def offsets(self, mixture: int, expert: int) -> list[int]:
        """Where the matrices of an expert lie in its slot, in the order of a pass."""
        return self._offsets[mixture][expert]

    def _fill_table(self, mode: ReadMode) -> None:
        """Say how to read."""
        table = self._table.reshape(-1, store.READ_WORDS)
        for row, r in zip(table, self._reads, strict=True):
            file, offset = self._files[r.info.path], r.info.offset + r.start
            # Reads past the system's cache begin and end with pages, and so must their places.
            fits = bool(r.tile) or offset % PAGE == 0
            direct = file.direct if mode.direct and fits else None
            begin = 0 if direct is None else offset % PAGE
            need = r.n_bytes + begin
            row[store.FILE] = file.plain.fileno() if direct is None else direct
            row[store.OFFSET] = offset - begin
            row[store.ASK] = need if direct is None else pages(need)
            row[store.NEED] = need
            row[store.TO], row[store.TILE] = r.to, r.tile
            row[store.ROW_BYTES], row[store.BLOCKS] = r.row_bytes, r.blocks
            row[store.TILES], row[store.BEGIN], row[store.ADDS] = r.tiles, begin, r.parts

    @property
    def counts(self) -> ExpertCounts:
        """What it has been asked for."""
        words: list[int] = self.words.tolist()
        table = self._experts.reshape(-1, store.EXPERT_WORDS)
        paused = (table[:, store.STATE] == store.COMING) & (table[:, store.PAUSED] != 0)
        reads = words[store.IN_VAIN] + int(table[paused, store.NEXT_READ].sum())
        read = np.count_nonzero(table[:, store.N_READS])
        each = self.slot_bytes * read / max(1, len(self._reads))
        return ExpertCounts(
            words[store.HITS], words[store.LATE], words[store.MISSES], words[store.ASKED],
            words[store.USED], words[store.DROPPED] + int(paused.sum()), int(reads * each),
            self.slot_bytes, words[store.REQUESTS], self._asking_s,
        )  # fmt: skip

    @property
    def span_address(self) -> int:
        """Of a window that nothing streams through, for the native loop."""
        return int(self._span.ctypes.data)

    def begin(self, mode: ReadMode, cancel: int) -> None:
        """Begin a pass: readers run until `halt`.

        Args:
            mode: how files are read.
            cancel: address of the word that cancels the pass.

        Raises:
            ModelFileError: a file has changed, or could not be read.
            HeadraceError: the system gives no thread.
        """
        if self._readers.error is not None or mode != self.mode:
            self.halt()
        self.words[store.CANCEL] = cancel
        self._check()
        if not self._readers.going:
            self.mode = mode
            self._readers.start(0, partial(self._prepare, mode))

    def end(self, finished: bool, seconds: float, ticks: int = 0) -> None:
        """End a pass that took so long; `ticks` of it, where a window has counted them.

        Raises:
            ModelFileError: it stopped because a read failed.
        """
        ticks = ticks or int(self._span[requests.SPAN])
        if ticks > 0:
            waited = int(self.words[store.STALL]) / ticks
            self.stall_s += seconds * waited
            self._asking_s += seconds * int(self.words[store.ASKING]) / ticks
            self.words[store.SURE] = int(self._sure_enough(waited) * store.ALWAYS)
        self.words[store.STALL] = self.words[store.ASKING] = self._span[requests.SPAN] = 0
        if not finished:
            # The clock by which they would go may stand still: passes that are cut off before they
            # claim anything would, one after the other, let all slots wait for what they predicted.
            self._places[:, store.STAYS] = 0
        error = self._readers.error
        if error is not None:
            self._forget()
            raise error
        if finished:
            self._check()

    def _sure_enough(self, waited: float) -> float:
        """How often what is believed must come true, after a pass that waited such a share."""
        counts = self.counts
        useful = (counts.useful + BENEFIT) * counts.slot_bytes
        over = (counts.wasted_bytes / useful - WASTE_BEGINS) / (WASTE_ENDS - WASTE_BEGINS)
        if over > 0:
            return store.SURE_ENOUGH + (SURE_WASTING - store.SURE_ENOUGH) * min(1.0, over)
        if counts.wasted_bytes > MOST_WASTE * counts.useful * counts.slot_bytes:
            return store.SURE_ENOUGH
        return store.SURE_ENOUGH + (SURE_WAITING - store.SURE_ENOUGH) * min(1.0, waited)

    def _check(self) -> None:
        try:
            for file in self._files.values():
                file.check()
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        """What is there may be of either file, where one was changed."""
        self.halt()
        states = self._experts.reshape(-1, store.EXPERT_WORDS)[:, store.STATE]
        states[states == store.THERE] = store.ABSENT
        self._places[:, store.EXPERT] = -1  # what is on its way is taken back when readers start

    def _prepare(self, mode: ReadMode, semaphore: Semaphore) -> list[np.ndarray]:
        words, system = self.words, system_functions()
        table = self._experts.reshape(-1, store.EXPERT_WORDS)
        coming = np.flatnonzero(table[:, store.STATE] == store.COMING)
        early = coming[table[coming, store.EARLY] != 0]
        words[store.DROPPED] += len(early)
        words[store.IN_VAIN] += table[early, store.DONE].sum()
        self._places[table[coming, store.SLOT], store.EXPERT] = -1
        table[coming, store.STATE] = store.ABSENT
        words[store.D_BEGIN : store.WAKING + 1] = 0
        self._fill_table(mode)
        words[[store.LOCK, store.STOP, store.FAILED]] = 0
        words[store.READ], words[store.NAP] = system.read, system.nap
        words[store.NAP_FOR], words[store.PATIENCE] = system.nap_for, PATIENCE_PAUSES
        words[store.DROP] = system.drop if mode.drop else 0
        words[store.TAKE], words[store.GIVE] = semaphore.take, semaphore.give
        words[store.GIVE_TO] = semaphore.handle
        words[store.READERS] = mode.readers
        all_own = [aligned_slots(store.OWN_WORDS) for _ in range(mode.readers)]
        sizes = (16 * r.tiles * r.row_bytes for r in self._reads if r.tile)  # tiles may be cut
        each = max(map(landing_bytes, sizes), default=0)
        if self._landing.n_bytes != mode.readers * each:
            self._landing.empty()
            self._landing = Arena({"rows": mode.readers * each})
        for i, own in enumerate(all_own):
            own[0], own[store.OWN_READ] = words.ctypes.data, -1
            own[store.OWN_ROWS] = self._landing.base + i * each
        return all_own

    def _read_again(self, own: np.ndarray) -> None:
        """Read what a native reader could not, or find out why.

        Raises:
            ModelFileError: the file shrank, or the disk failed.
        """
        r = self._reads[int(own[store.OWN_READ])]
        info = TensorInfo(r.info.name, "I8", (r.n_bytes,), r.info.path, r.info.offset + r.start,
                          r.n_bytes)  # fmt: skip
        row = self._table.reshape(-1, store.READ_WORDS)[int(own[store.OWN_READ])]
        if r.tile:
            at = int(own[store.OWN_ROWS]) - self._landing.base + int(row[store.BEGIN])
            to = self._landing.view("rows")[at : at + r.n_bytes]
        else:
            expert = self._experts.reshape(-1, store.EXPERT_WORDS)[int(own[store.OWN_EXPERT])]
            at = int(expert[store.SLOT]) * self.slot_bytes + r.to
            to = self._slots.view("slots")[at : at + r.n_bytes]
        self._plainly.readinto(info, 0, to)
        if self.words[store.READ]:
            self.mended_reads += 1

    def close(self) -> None:
        """End the readers and give the memory back: steps may refer to it for some time yet."""
        self.halt()
        for arena in (self._slots, self._landing):
            arena.empty()

    def halt(self) -> None:
        """End the readers; what they have not finished is forgotten when a pass begins again."""
        self._readers.halt()

    def expert_bytes(self, number: int) -> np.ndarray | None:
        """A copy of what a slot has of an expert; None if it is not there."""
        row = self._experts.reshape(-1, store.EXPERT_WORDS)[number]
        if row[store.STATE] != store.THERE:
            return None
        at = int(row[store.SLOT]) * self.slot_bytes
        return self._slots.view("slots")[at : at + self.slot_bytes].copy()
