"""The cache of experts with real files and real readers: the true bytes, whatever is asked when."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.errors import ModelFileError
from headrace.expert_memory import look_ahead
from headrace.kernels import expert_cache as steps
from headrace.kernels import expert_visits
from headrace.kernels import experts as plain
from headrace.kernels.invoke import argument_block
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.reader import TensorReader
from headrace.offload import expert_cache, readers
from headrace.offload import expert_store as store
from headrace.offload.expert_cache import ExpertCache, ExpertMatrix, pages
from headrace.offload.files import close_all, open_streamed, stamp_of
from headrace.offload.modes import MODES, ReadMode
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.table import ENTRY

LAYERS, EXPERTS, ACTIVE = 5, 8, 2
SIZES = (5000, 5000, 4096)
N_PRODUCTS = 5


class Harness:
    """A store over a file of random bytes, driven as a plan would, by one thread."""

    def __init__(self, path: Path, n_slots: int, policy: int, mode: ReadMode, aligned: bool):
        rng = np.random.default_rng(0)
        self.rng = rng
        at, chunks, layers = 0, [], []
        self.content: dict[int, list[np.ndarray]] = {}
        for layer in range(LAYERS):
            layers.append([])
            for e in range(EXPERTS):
                matrices = []
                for part, size in enumerate(SIZES):
                    data = rng.integers(0, 256, size).astype(np.uint8)
                    info = TensorInfo(f"{layer}.{e}.{part}", "I8", (size,), path, at, size)
                    matrices.append(ExpertMatrix(info, size))
                    self.content.setdefault(layer * EXPERTS + e, []).append(data)
                    padding = pages(size) - size if aligned else 3
                    chunks += [data.tobytes(), bytes(padding)]
                    at += size + padding
                layers[-1].append(matrices)
        path.write_bytes(b"".join(chunks))
        self.files = open_streamed({path: stamp_of(path)})
        rows = [store.kernel(), *steps.all_kernels()]
        self.kernels = KernelStore(pick_target(None), 1)  # they go with it
        addresses = self.kernels.load(rows)
        self.entry = {k.name: ENTRY(addresses[k.name]) for k in rows}
        self.ahead = look_ahead(n_slots, ACTIVE)
        self.cache = ExpertCache(
            layers,
            n_slots,
            addresses["experts_read"],
            self.files,
            self.ahead,
            ACTIVE,
            policy=policy,
        )
        # Gates have two formats, ups one, and downs two.
        self.directories = np.zeros((LAYERS, EXPERTS, plain.DIRECTORY_SLOTS), np.int64)
        for layer, e in np.ndindex(LAYERS, EXPERTS):
            entry = self.directories[layer, e]
            entry[:] = (*self.cache.offsets(layer, e), e % 2, 2, 3 + e % 2, 7, 9)
        self.mode = mode
        self.cancel = np.zeros(1, np.int64)

    def call(self, kernel: str, slots: list) -> None:
        block = argument_block(slots)
        self.entry[kernel](block.ctypes.data, 0, 1)

    def begin(self) -> None:
        self.cache.begin(self.mode, self.cancel.ctypes.data)

    def close(self) -> None:
        self.cache.halt()
        close_all(self.files.values())

    def token(self, layer: int, chosen: list[int], ahead: list[float] | None = None) -> None:
        """One layer of one token: claim, wait, look; then what is predicted for the next one."""
        wanted = np.array(chosen, np.int64)
        written = self.claim(layer, wanted)
        outputs = written[:, 2 * N_PRODUCTS : -1]
        assert sorted((outputs[:, 0] - 1000) // 64) == list(range(ACTIVE))
        assert np.array_equal(outputs[:, 0], outputs[:, 1])
        for row in written:
            number = int(row[-1])
            assert chosen[(int(row[-2]) - 1000) // 64] == number - self.cache.first[layer]
            if ahead is not None:
                for distance in range(1, self.ahead + 1):
                    self.predict((layer + distance) % LAYERS, distance, ahead)
                    ahead = ahead[1:] + ahead[:1]
            self.call("experts_await", [self.cache.words, number, store.ALL_PARTS])
            assert not self.cancel[0]
            self.check(number, row[: 2 * N_PRODUCTS])

    def claim(self, layer: int, wanted: np.ndarray) -> np.ndarray:
        """What is written for each choice: products, two outputs, the expert to wait for."""
        written = np.zeros((ACTIVE, 2 * N_PRODUCTS + 3), np.int64)
        table = written.ctypes.data + 8 * np.arange(written.size)
        self.call("experts_claim", [
            self.cache.words, wanted, ACTIVE, self.cache.first[layer], layer, table,
            self.directories[layer], 1000, 64, self.cache.predictions_address(layer, 1),
            self.ahead, N_PRODUCTS, 2, EXPERTS, ACTIVE, 0, 1,
        ])  # fmt: skip
        return written

    def ask(self, layer: int, expert: int) -> int:
        """Claim an expert and another one; the number of the first."""
        self.claim(layer, np.array([expert, (expert + 1) % EXPERTS], np.int64))
        return int(self.cache.first[layer] + expert)

    def predict(self, layer: int, distance: int, logits: list[float]) -> None:
        self.cache.words[store.SURE] = 0  # all are believed
        self.cache.words[store.READERS] = 100  # so many always have too little to do
        row = np.array(logits, np.float32)
        at = self.cache.predictions_address(layer, distance)
        self.call("experts_predict", [
            self.cache.words, row, EXPERTS, at, ACTIVE, self.cache.first[layer], layer,
            distance - 1, 0,
        ])  # fmt: skip

    def check(self, number: int, products: np.ndarray) -> None:
        """An expert is there, and its products read it: no others do."""
        found = self.cache.expert_bytes(number)
        assert found is not None
        entry = self.directories[number // EXPERTS, number % EXPERTS].tolist()
        own, pairs = entry[plain.PRODUCTS : plain.PRODUCTS + 3], products.reshape(-1, 2)
        assert [pairs[p, 1] for p in own] == [7, 7, 9]
        assert all(pairs[p, 1] == 0 for p in range(N_PRODUCTS) if p not in own)
        for data, at, p in zip(self.content[number], entry[:3], own, strict=True):
            assert np.array_equal(found[at : at + data.size], data), number
            assert (int(pairs[p, 0]) - at) % 64 == 0


PLAINLY = next(mode for mode in MODES if not mode.direct)
MODES_HERE = [pytest.param(mode, id=f"{mode.readers}-{'direct' if mode.direct else 'plain'}")
              for mode in MODES]  # fmt: skip


@pytest.fixture(params=MODES_HERE)
def mode(request: pytest.FixtureRequest) -> ReadMode:
    return request.param


@pytest.fixture(params=[(5, True), (12, True), (40, True)], ids=["few", "some", "all"])
def harness(request: pytest.FixtureRequest, tmp_path: Path, mode: ReadMode) -> Iterator[Harness]:
    n_slots, aligned = request.param
    for policy in (store.LFU,):
        made = Harness(tmp_path / "experts", n_slots, policy, mode, aligned)
        if mode.direct and any(f.direct is None for f in made.files.values()):
            pytest.skip("no direct reads here")
        made.begin()
        yield made
        made.close()


def test_tokens_get_their_experts(harness: Harness) -> None:
    for _ in range(40):
        for layer in range(LAYERS):
            chosen = harness.rng.permutation(EXPERTS)[:ACTIVE].tolist()
            ahead = harness.rng.standard_normal(EXPERTS).tolist()
            harness.token(layer, chosen, ahead)
    words = harness.cache.words
    uses = words[store.HITS] + words[store.LATE] + words[store.MISSES]
    assert uses == 40 * LAYERS * ACTIVE
    assert words[store.ASKED] >= words[store.USED]
    if harness.cache.n_slots == LAYERS * EXPERTS:
        assert words[store.MISSES] + words[store.ASKED] - words[store.DROPPED] <= LAYERS * EXPERTS


def test_chunks_visit_every_expert_once(harness: Harness) -> None:
    for turn in range(6):
        for layer in range(LAYERS):
            some = np.flatnonzero(harness.rng.random(EXPERTS) < 0.7).tolist() or [turn]
            assert sorted(visited(harness, layer, some)) == some


def test_the_share_of_tokens_that_take_an_expert(harness: Harness) -> None:
    """That of the last ones, whether they come one by one or in a chunk."""
    table = harness.cache._experts.reshape(LAYERS, EXPERTS, store.EXPERT_WORDS)
    expected = table[..., store.SHARE].copy()
    for turn in range(4):
        chosen = harness.rng.permutation(EXPERTS)[:ACTIVE].tolist()
        harness.token(1, chosen)
        taken = np.isin(np.arange(EXPERTS), chosen)
        expected[1] = (expected[1] * steps.FADES + taken * store.ALWAYS) // (steps.FADES + 1)
        some = [turn, turn + 3]
        visited(harness, 2, some)
        taken = np.where(np.isin(np.arange(EXPERTS), some), 10 + np.arange(EXPERTS), 0)
        tokens = int(taken.sum()) // ACTIVE
        faded = expected[2] * steps.FADES + taken * store.ALWAYS
        expected[2] = faded // (steps.FADES + tokens)
        assert np.array_equal(table[..., store.SHARE], expected)


@pytest.mark.parametrize("policy", [store.LRU, store.LFU, store.EDGE, store.EDGE_PRINTED])
@pytest.mark.parametrize("aligned", [True, False])
def test_policies_and_places(tmp_path: Path, policy: int, aligned: bool) -> None:
    harness = Harness(tmp_path / "experts", 9, policy, PLAINLY, aligned)
    harness.begin()
    try:
        for _ in range(20):
            for layer in range(LAYERS):
                harness.token(layer, harness.rng.permutation(EXPERTS)[:ACTIVE].tolist())
        assert harness.cache.words[store.HITS] > 0
        harness.cache.halt()  # what is there stays
        harness.begin()
        harness.token(0, [3, 4])
    finally:
        harness.close()


class SlowReader(TensorReader):
    """Reads after a while; where `together` are to be, after so many have come, or long after."""

    together: threading.Barrier | None = None

    def readinto(self, *args: Any) -> None:
        if self.together is not None:
            self.together.wait(10)
        else:
            time.sleep(0.02)
        super().readinto(*args)


@pytest.fixture(params=[(6, 1)])
def slow(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Harness]:
    """So many slots, and readers all of whose reads Python makes, each after a while."""
    n_slots, n_readers = request.param
    some = replace(PLAINLY, readers=n_readers)
    harness = Harness(tmp_path / "experts", n_slots, store.LFU, some, False)
    functions = replace(readers.system_functions(), read=0)
    monkeypatch.setattr(expert_cache, "system_functions", lambda: functions)
    plain_files = {path: file.plain for path, file in harness.files.items()}
    harness.cache._plainly = SlowReader(plain_files)
    harness.begin()
    yield harness
    harness.close()


def visited(harness: Harness, layer: int, some: list[int]) -> list[int]:
    """A chunk that has chosen some experts: those visited, in turn."""
    visits = np.zeros(expert_visits.visit_words(EXPERTS), np.int64)
    visits[expert_visits.LEFT] = len(some)
    for i, e in enumerate(some):
        visits[expert_visits.VISITS + 3 * i : expert_visits.VISITS + 3 * i + 3] = (
            e,
            10 + e,
            100 + e,
        )
    written = np.zeros(2 * N_PRODUCTS, np.int64)
    table = written.ctypes.data + 8 * np.arange(written.size)
    seen, count = [], np.array([sum(10 + e for e in some) // ACTIVE], np.int64)
    while visits[expert_visits.LEFT]:
        harness.call("experts_visit", [
            visits, harness.cache.words, table, N_PRODUCTS, harness.cache.first[layer],
            layer, harness.directories[layer], EXPERTS, count,
        ])  # fmt: skip
        e = int(visits[expert_visits.TOKENS]) - 10
        assert visits[expert_visits.FIRST] == 100 + e
        seen.append(e)
        harness.check(harness.cache.first[layer] + e, written)
    return seen


@pytest.mark.parametrize("slow", [(40, 1)], indirect=True)
def test_a_chunk_waits_for_what_was_asked_ahead_of_a_slow_disk(slow: Harness) -> None:
    """It asks once, not at every look, for what has not begun to be read."""
    for distance in range(1, 5):
        slow.predict(distance, distance, list(range(EXPERTS)))
    slow.predict(0, 1, list(range(EXPERTS)))
    assert sorted(visited(slow, 0, [1, 5, 6, 7])) == [1, 5, 6, 7]
    assert slow.cache.words[store.LATE] == ACTIVE
    assert slow.cache.words[store.D_END] <= 4


def test_what_is_not_wanted_any_more_stops_and_goes_on_when_it_is(slow: Harness) -> None:
    """Reads ahead of a layer end where it has chosen others; what was read of them is kept."""
    words = slow.cache.words
    table = slow.cache._experts.reshape(-1, store.EXPERT_WORDS)
    slow.predict(1, 1, list(range(EXPERTS)))  # 7, then 6
    while not table[EXPERTS + 7, store.DONE]:
        time.sleep(0.001)
    slow.token(1, [2, 3])
    begun = int(table[EXPERTS + 7, store.NEXT_READ])
    assert table[EXPERTS + 7, store.PAUSED] and 1 <= begun < len(SIZES)
    time.sleep(0.05)
    assert table[EXPERTS + 7, store.DONE] == table[EXPERTS + 7, store.NEXT_READ] == begun
    counts = slow.cache.counts
    assert (counts.ahead, counts.useful, counts.taken_back) == (2, 0, 2)
    assert 0 < counts.in_vain_bytes == counts.wasted_bytes < slow.cache.slot_bytes
    before = int(words[store.MISSES])
    slow.token(1, [7, 2])  # looks at the bytes
    assert table[EXPERTS + 7, store.DONE] == len(SIZES)
    assert slow.cache.counts.useful == 1
    # It has been read once, and counts once.
    assert words[store.MISSES] == before and words[store.LATE] == 1
    slow.token(2, [0, 1])
    slow.token(3, [0, 1])  # all slots are taken: also that of 6, of which nothing was read
    assert table[EXPERTS + 6, store.STATE] == store.ABSENT
    counts = slow.cache.counts
    assert (counts.ahead, counts.useful, counts.taken_back) == (2, 1, 1)
    assert counts.wasted_bytes == 0


def test_a_part_is_there_before_the_expert_is(slow: Harness) -> None:
    """Products of gate can begin while up and down are still being read."""
    number = slow.ask(0, 3)
    row = slow.cache._experts.reshape(-1, store.EXPERT_WORDS)[number]
    for part, data in enumerate(slow.content[number]):
        slow.call("experts_await", [slow.cache.words, number, store.part_mask(part)])
        assert row[store.DONE] <= part + 1  # one reader, in turn
        at = int(row[store.SLOT]) * slow.cache.slot_bytes + slow.cache.offsets(0, 3)[part]
        assert np.array_equal(slow.cache._slots.view("slots")[at : at + data.size], data)
    assert slow.cache.words[store.STALL] > 0


@pytest.mark.parametrize("slow", [(2 * ACTIVE, 1)], indirect=True)
def test_what_is_wanted_takes_the_place_of_what_is_not(slow: Harness) -> None:
    """With no slot left, what was asked for ahead in error is not read first."""
    slow.predict(1, 1, list(range(EXPERTS)))  # 7, then 6
    slow.predict(1, 1, list(range(EXPERTS, 0, -1)))  # 0, then 1: no slot is left
    slow.token(1, [2, 3])
    table = slow.cache._experts.reshape(-1, store.EXPERT_WORDS)
    assert table[[EXPERTS, EXPERTS + 1], store.NEXT_READ].sum() == 0
    counts = slow.cache.counts
    assert (counts.ahead, counts.useful, counts.misses) == (4, 0, ACTIVE)
    assert slow.cache.words[store.STALL] > 0


@pytest.mark.parametrize("slow", [(40, 3)], indirect=True)
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "demanded"])
def test_readers_wake_each_other(slow: Harness, ahead: bool) -> None:
    """One is woken for what is asked for ahead, and all work; it comes if nobody waits for it."""
    words, reader = slow.cache.words, slow.cache._plainly
    assert isinstance(reader, SlowReader)
    reader.together = threading.Barrier(3)  # of six reads, or the wait for the others ends as error
    table = slow.cache._experts.reshape(-1, store.EXPERT_WORDS)
    for layer in range(LAYERS):  # again, when all sleep
        if ahead:
            slow.predict(layer, 1, list(range(EXPERTS)))
        else:
            slow.claim(layer, np.array([EXPERTS - 2, EXPERTS - 1], np.int64))
        states = table[layer * EXPERTS + EXPERTS - 2 : (layer + 1) * EXPERTS, store.STATE]
        deadline = time.monotonic() + 20
        while (states != store.THERE).any() or words[store.WAKING]:
            assert not words[store.FAILED] and time.monotonic() < deadline
            time.sleep(0.001)


def test_what_a_halt_interrupts_was_taken_back(slow: Harness) -> None:
    slow.predict(1, 1, list(range(EXPERTS)))
    slow.cache.halt()
    slow.begin()
    counts = slow.cache.counts
    assert (counts.ahead, counts.useful, counts.taken_back) == (2, 0, 2)
    assert counts.wasted_bytes == counts.in_vain_bytes < slow.cache.slot_bytes
    slow.token(1, [7, 2])
    assert slow.cache.counts.misses == 2 and slow.cache.counts.wasted_bytes < 5000


def test_what_was_read_of_another_file_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    harness = Harness(path, 12, store.LFU, PLAINLY, True)
    before, content = path.stat(), path.read_bytes()
    harness.begin()
    path.write_bytes(bytes(len(content)))
    harness.call("experts_await", [harness.cache.words, harness.ask(0, 3), store.ALL_PARTS])
    with pytest.raises(ModelFileError, match="changed while it is in use"):
        harness.cache.end(True, 1.0)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    try:
        harness.begin()
        harness.token(0, [3, 4])  # looks at the bytes
    finally:
        harness.close()


def test_passes_that_were_cut_off_hold_no_slots(tmp_path: Path) -> None:
    """What each predicted before it claimed anything makes room; the next one finds slots."""
    harness = Harness(tmp_path / "experts", 4 * ACTIVE, store.LFU, PLAINLY, True)
    late = threading.Timer(10, lambda: harness.cancel.fill(1))  # instead of a wait without end
    try:
        for first in range(0, EXPERTS, ACTIVE):
            harness.begin()
            logits = np.zeros(EXPERTS)
            logits[first : first + ACTIVE] = 1, 2
            harness.predict(1, 2, logits.tolist())
            harness.cache.end(False, 1.0)
        harness.begin()
        late.start()
        harness.token(0, [2, 3])
    finally:
        late.cancel()
        harness.close()


def test_a_file_that_cannot_be_read_ends_the_wait(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "experts", 9, store.LFU, PLAINLY, True)
    harness.begin()
    (tmp_path / "experts").write_bytes(b"")
    written = harness.claim(0, np.array([1, 2], np.int64))
    harness.call("experts_await", [harness.cache.words, int(written[0, -1]), store.ALL_PARTS])
    assert harness.cancel[0]
    with pytest.raises(Exception, match="experts"):
        harness.cache.end(False, 1.0)
    harness.close()


def test_guesses_that_are_mostly_wrong_are_believed_less_and_less(tmp_path: Path) -> None:
    """Of what a pass believes that only waits, by what was read in vain until then."""
    harness = Harness(tmp_path / "experts", 9, store.LFU, PLAINLY, True)
    words, found = harness.cache.words, []
    try:
        for asked, used in ((0, 0), (1000, 860), (1000, 825), (3, 0), (1000, 790), (1000, 700)):
            words[store.ASKED], words[store.USED], words[store.STALL] = asked, used, 100
            harness.cache.end(True, 1.0, ticks=100)
            found.append(words[store.SURE] / store.ALWAYS)
    finally:
        harness.close()
    waits, little, more, few, much, most = found
    assert waits == little == pytest.approx(expert_cache.SURE_WAITING, abs=1e-4)
    assert more == few == pytest.approx(store.SURE_ENOUGH, abs=1e-4)
    assert store.SURE_ENOUGH + 0.1 < much < expert_cache.SURE_WASTING - 0.01
    assert most == pytest.approx(expert_cache.SURE_WASTING, abs=1e-4)
