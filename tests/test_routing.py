"""Routes of a text: recorded, kept in files, learned from, and replayed."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_experts import FAMILIES, mixture

import headrace
from headrace.cli import main
from headrace.compress import compress
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.expert_memory import USEFUL, hits_in_time
from headrace.learned_routes import statistics_path
from headrace.memory_plan import memory_plan
from headrace.offload import array_file
from headrace.offload.modes import FLASH_SHARE, MODES, FlashRate
from headrace.offload.route_statistics import RouteStatistics, learn, read_statistics
from headrace.offload.route_trace import NONE, RouteTrace, read_trace
from headrace.offload.router_fit import DISTANCES, TOKENS, RouterFit
from headrace.offload.routing_replay import POLICIES, Replay, predictor_of, rates, replay
from headrace.planning import bounds, prepare
from headrace.prediction import Passes, Rates, Sample
from headrace.routing import record

TEXT = "Once upon a time there was a girl called Lily. She liked to play with a big red ball. " * 9
RATES = np.array([(0.25, 0.4, 0.7, 0.3), (1.0, 1.0, 0.0, 1.0)], np.float32)
ONLINE = [name for name in POLICIES if name != "belady"]


def no_predictor(token: int, mixture: int) -> Iterator[tuple[int, np.ndarray]]:
    yield from ()


def random_trace(
    seed: int = 0, tokens: int = 300, mixtures: int = 4, active: int = 2
) -> RouteTrace:
    """Experts that mostly follow from those of the mixture before, or from the token before."""
    rng = np.random.default_rng(seed)
    mixtures, active = 4, 2
    experts = np.array([8] * mixtures)
    chosen = np.zeros((tokens, mixtures, active), np.uint16)
    for t in range(tokens):
        for m in range(mixtures):
            one = rng.permutation(8)[:active]
            if t and rng.random() < 0.5:
                one = chosen[t - 1, m]
            chosen[t, m] = one
    ahead = np.full((2, *chosen.shape), NONE, np.uint16)
    ahead[0] = chosen
    margins = np.ones(ahead.shape, np.float16)
    return RouteTrace("0" * 64, 100, experts, experts, chosen, ahead, margins)


# --- recording ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2moe", "qwen3moe"])
def test_routes_are_those_of_the_model(name: str) -> None:
    path = FAMILIES / f"{name}.gguf"
    found = record(path, TEXT, tokens=90, threads=2)
    tokens, mixtures, active = found.chosen.shape
    with headrace.load(path, activations="f32", threads=2, context=128) as model:
        ids = model.tokenize(TEXT)[:tokens]
        model.logits(ids)
        buffers = model._programs.buffers
        for m in range(mixtures):
            expected = buffers.view(f"chosen{m}", "i8")[: tokens * active].reshape(tokens, active)
            same = (found.chosen[:, m] == expected).all(axis=1)
            assert same.mean() > 0.97, (m, same.mean())  # float16 keys, and near ties


def test_predictions_of_hidden_states_that_stay(tmp_path: Path) -> None:
    """Where layers add nothing, routers see ahead of time what they will see."""
    spec = mixture()
    for name, values in spec.tensors.items():
        if "attn_output" in name or "ffn_down" in name:
            spec.tensors[name] = np.zeros_like(values)
    found = record(spec.write(tmp_path / "m.gguf"), "abcdefgh" * 20, tokens=40, threads=1)
    assert len(np.unique(found.chosen[:, 1])) > 2
    assert np.array_equal(found.ahead[0], found.chosen)
    assert (found.ahead[1, :, 0] == NONE).all()
    assert np.array_equal(found.ahead[1, :, 1], found.chosen[:, 1])


def test_what_has_no_routes(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no mixtures"):
        record(FAMILIES / "llama3.gguf", TEXT)
    with pytest.raises(HeadraceError, match="too short"):
        record(FAMILIES / "mixtral.gguf", "Once")


# --- files ----------------------------------------------------------------------------------------


def test_files_keep_all(tmp_path: Path) -> None:
    trace = random_trace()
    trace.write(tmp_path / "t.routes")
    again = read_trace(tmp_path / "t.routes")
    learned = learn(again, RATES)
    learned.write(tmp_path / "s.routes")
    for one, two in ((trace, again), (learned, read_statistics(tmp_path / "s.routes"))):
        for name, value in vars(one).items():
            assert np.array_equal(value, getattr(two, name)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.routes", "t.routes"]


BAD: dict[str, Any] = {
    "an expert there is not": {"chosen": lambda x: x + 8},
    "the same expert twice": {"chosen": lambda x: x[:, :, :1].repeat(2, axis=2)},
    "fewer experts than a token takes": {"experts": lambda x: x * 0 + 1},
    "predictions of other sizes": {"ahead": lambda x: x[:, :-1]},
    "an impossible prediction": {"ahead": lambda x: x * 0 + 9},
    "no tokens": {
        n: lambda x, n=n: x[:0] if n == "chosen" else x[:, :0]
        for n in ("chosen", "ahead", "margins")
    },
    "a negative margin": {"margins": lambda x: -x},
    "no window": {"window": lambda x: 0},
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_records(case: str, tmp_path: Path) -> None:
    trace, path = random_trace(), tmp_path / "t.routes"
    changed = {name: change(getattr(trace, name)) for name, change in BAD[case].items()}
    replace(trace, **changed).write(path)
    with pytest.raises(ModelFileError, match=r"t\.routes.*record it again"):
        read_trace(path)


def test_files_that_are_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.routes"
    random_trace().write(path)
    content = path.read_bytes()
    for n in range(0, len(content), 97):
        path.write_bytes(content[:n])
        with pytest.raises(ModelFileError, match="record it again"):
            read_trace(path)
    rng = np.random.default_rng(0)
    for _ in range(200):  # flipped bits are noticed, or do no harm
        damaged = bytearray(content)
        damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            read_trace(path)
        except ModelFileError:
            continue
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="record it again"):
        read_statistics(path)
    monkeypatch.setattr(array_file, "MOST_BYTES", 1000)
    with pytest.raises(ModelFileError, match="more than 1,000 bytes"):
        read_trace(path)
    with pytest.raises(HeadraceError, match="no such file"):
        read_trace(tmp_path / "none.routes")


def test_statistics_that_are_none(tmp_path: Path) -> None:
    learned, path = learn(random_trace(), RATES), tmp_path / "s.routes"
    for name, value in (
        ("frequency", learned.frequency + 1), ("pairs", learned.pairs[:2]), ("active", 9),
        ("affinity", learned.affinity * np.float16(np.nan)), ("tokens", 0), ("rates", RATES[:0]),
        ("rates", RATES[::-1]), ("rates", RATES[:, :3]), ("rates", RATES * np.float32(np.nan)),
        ("rates", RATES * np.float32(1.1)),
        ("fitted", np.zeros((4, 1, 9, 5))), ("fitted", np.full((4, 1, 8, 5), np.nan)),
    ):  # fmt: skip
        replace(learned, **{name: value}).write(path)
        with pytest.raises(ModelFileError, match="record it again"):
            read_statistics(path)


# --- learning -------------------------------------------------------------------------------------


def test_routers_are_fitted_to_what_later_ones_say() -> None:
    """Each mixture's logits are linear in what is read one and two before it, which is noise."""
    rng, mixtures, experts, width, tokens = np.random.default_rng(4), 4, 6, 24, 900
    fitting = RouterFit()
    assert fitting.begin(mixtures, experts, width, tokens) > 2 * tokens * width
    read = {m: rng.standard_normal((tokens, width)).astype(np.float32) for m in range(-1, mixtures)}
    true = rng.standard_normal((mixtures, 3, experts, width)).astype(np.float32)
    for m in range(-1, mixtures):
        logits = None
        if m >= 0:
            logits = np.full((tokens, experts), 0.5, np.float32)
            for distance in (1, 2):
                if m - distance in read:
                    logits += read[m - distance] @ true[m, distance].T
        for first in range(0, tokens, 100):
            rows = slice(first, first + 100)
            fitting.add(m, first, read[m][rows], None if logits is None else logits[rows])
    fitting.end()
    for m in range(mixtures):
        for distance in (1, 2):
            if m - distance < -1:
                continue
            found = fitting.fitted[m, distance - 1].astype(np.float32)
            # What the other distance adds is noise: of variance `width`, over so many tokens.
            error = np.abs(found[:, :-1] - true[m, distance]).max()
            assert error < 6 * (width / tokens) ** 0.5, (m, distance, error)
            assert np.abs(found[:, -1] - 0.5).max() < 6 * (width / tokens) ** 0.5


def test_routers_are_fitted_to_what_the_next_token_chooses() -> None:
    """The first mixtures' logits are linear in what the last ones read a token before."""
    rng, mixtures, experts, width, tokens = np.random.default_rng(5), 6, 5, 16, 800
    fitting = RouterFit()
    fitting.begin(mixtures, experts, width, tokens)
    read = rng.standard_normal((mixtures + 1, tokens, width)).astype(np.float32)  # 0: embedding
    # Each of the first ones by one of those that say something of it.
    sources = {0: 5, 1: 5, 2: 5}
    true = {m: rng.standard_normal((experts, width)).astype(np.float32) for m in sources}
    for number in range(-1, mixtures):
        logits = rng.standard_normal((tokens, experts)).astype(np.float32)
        if number in sources:
            logits[1:] = read[sources[number] + 1, :-1] @ true[number].T
        for first in range(0, tokens, 64):
            rows = slice(first, first + 64)
            fitting.add(number, first, read[number + 1, rows], None if number < 0 else logits[rows])
    fitting.end()
    for later, source in sources.items():
        distance = mixtures + 1 + later - source
        assert later + 1 < distance <= DISTANCES
        found = fitting.fitted[later, distance - 1].astype(np.float32)
        assert np.abs(found[:, :-1] - true[later]).max() < 0.05


def test_fewer_tokens_and_fewer_mixtures_ahead_where_there_is_less_room() -> None:
    fitting = RouterFit()
    few = fitting.begin(4, 8, 100, 1 << 20)
    assert few < 2 * TOKENS * 101 * 6
    assert fitting.fitted.shape == (4, DISTANCES, 8, 101)
    fitting.begin(94, 128, 4096, 100)
    assert fitting.fitted.shape[1] == 1


def by_hand(trace: RouteTrace, mixture: int, distance: int) -> Iterator[tuple[Any, Any]]:
    """Pairs (what was chosen before, what is chosen now), token by token."""
    tokens, mixtures, _ = trace.chosen.shape
    for t in range(tokens):
        at, token = mixture - distance, t
        while at < 0:
            at, token = at + mixtures, token - 1
        if token // trace.window == t // trace.window and token >= 0:
            yield trace.chosen[token, at], trace.chosen[t, mixture]


def test_tables_count_what_follows() -> None:
    trace = random_trace(3, tokens=250)
    learned = learn(trace, RATES)
    for m in range(4):
        counts = np.bincount(trace.chosen[:, m].ravel(), minlength=8)
        assert np.allclose(learned.frequency[m], counts / 250)
        seen, follows = np.zeros(8), np.zeros((8, 8))
        for before, now in by_hand(trace, m, 1):
            seen[before] += 1
            for e in before:
                follows[e, now] += 1
        expected = (follows + 4 * learned.frequency[m]) / (seen[:, None] + 4)
        assert np.abs(learned.affinity[m] - expected).max() < 1e-3
        seen2, follows2 = np.zeros((8, 8)), np.zeros((8, 8, 8))
        pairs = zip(list(by_hand(trace, m, 1))[-len(list(by_hand(trace, m, 2))):],
                    by_hand(trace, m, 2), strict=True)  # fmt: skip
        if m in (0, 1):  # the last token of a window has both, its first none
            continue
        for (one, now), (two, _) in pairs:
            for e in two:
                for f in one:
                    seen2[e, f] += 1
                    follows2[e, f, now] += 1
        expected2 = (follows2 + 4 * expected[None]) / (seen2[..., None] + 4)
        assert np.abs(learned.pairs[m] - expected2).max() < 2e-3


def test_tables_predict_what_always_follows() -> None:
    """Experts that are a function of the two mixtures before."""
    rng = np.random.default_rng(5)
    chosen = np.zeros((400, 3, 1), np.uint16)
    flat = chosen.reshape(-1)
    rule = rng.permutation(64) % 8
    flat[:2] = (1, 5)
    for i in range(2, len(flat)):
        flat[i] = rule[int(flat[i - 2]) * 8 + int(flat[i - 1])] if i % 7 else rng.integers(8)
    ahead = np.full((2, *chosen.shape), NONE, np.uint16)
    trace = RouteTrace(
        "0" * 64,
        400,
        np.array([8, 8, 8]),
        np.array([8, 8, 8]),
        chosen,
        ahead,
        np.ones(ahead.shape, np.float16),
    )
    learned = learn(trace, RATES)
    right = 0
    for i in range(2, len(flat)):
        scores = learned.by_pairs(i % 3, flat[i - 2 : i - 1], flat[i - 1 : i])
        right += int(np.argmax(scores)) == flat[i]
    assert right > 0.85 * len(flat)


# --- replaying ------------------------------------------------------------------------------------


def lru_hits(trace: RouteTrace, slots: int) -> int:
    """By hand: experts of a mixture come in together."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for token in trace.chosen:
        for m, some in enumerate(token):
            keys = [(m, int(e)) for e in some]
            hits += sum(key in held for key in keys)
            for key in keys:
                held.pop(key, None)
            for key in keys:
                held[key] = None
                if len(held) > slots:
                    held.popitem(last=False)
    return hits


@pytest.mark.parametrize("slots", [4, 9, 20])
def test_lru_is_lru(slots: int) -> None:
    trace = random_trace(slots)
    found = replay(trace, slots, "lru", no_predictor)
    expected = lru_hits(trace, slots)
    assert abs(found.hits - expected) <= 0.01 * expected + 2  # experts of a mixture are as old
    assert found.hits + found.late + found.misses == trace.chosen.size


@pytest.mark.parametrize("seed", range(4))
def test_nobody_is_better_than_who_knows_the_future(seed: int) -> None:
    trace = random_trace(seed)
    for slots in (5, 10, 24):
        rates = {name: replay(trace, slots, name, no_predictor).hits for name in POLICIES}
        assert all(rates["belady"] >= rates[name] for name in ONLINE), rates
        assert rates["edgemoe corrected"] >= 0.97 * rates["random"]


def test_room_for_all_reads_each_once() -> None:
    trace = random_trace()
    for name in POLICIES:
        found = replay(trace, 32, name, no_predictor)
        assert found.misses == len(np.unique(trace.chosen + 8 * np.arange(4)[None, :, None]))


def test_a_predictor_that_is_always_right() -> None:
    trace = random_trace()
    gates = predictor_of("pre-gating", trace, None)
    found = replay(trace, 8, "lru", gates)
    first = trace.chosen[:, 0].size  # for which nobody predicts
    assert found.late == 0 and found.ahead == found.useful > 0
    assert found.misses <= first
    slow = replay(trace, 8, "lru", gates, read_time=100.0)
    assert slow.hits < found.hits and slow.late > 0 and slow.stall > found.stall


def test_a_predictor_that_is_always_wrong_is_not_believed_for_long() -> None:
    trace = random_trace()
    wrong = np.full_like(trace.ahead, NONE)
    for t, token in enumerate(trace.chosen):
        for m, some in enumerate(token):
            wrong[0, t, m] = [e for e in range(8) if e not in some][:2]
    trace = replace(trace, ahead=wrong)
    gates = predictor_of("pre-gating", trace, None)
    careful = replay(trace, 8, "lru", gates)
    careless = replay(trace, 8, "lru", gates, sure=0.0)
    assert careful.ahead < 0.15 * careless.ahead
    assert careful.hits >= 0.9 * replay(trace, 8, "lru", no_predictor).hits


def test_time_is_computing_and_waiting() -> None:
    trace = random_trace(tokens=50)
    found: Replay = replay(trace, 8, "lfu", no_predictor, read_time=0.5)
    assert found.time == pytest.approx(50 * 4 + found.stall)
    assert found.stall == pytest.approx(0.5 * found.misses)


def test_rates_grow_with_room() -> None:
    seen: list[tuple[int, int]] = []
    found = rates(random_trace(), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    share, hits, reads, early = found.T
    assert (np.diff(share) > 0).all() and (np.diff(hits) > -0.01).all()
    assert (np.diff(reads) < 0.05).all() and found[-1].tolist() == [1, 1, 0, 1]
    assert share[0] == 4 / 32 and (early > 0).all()


# --- what plans know ------------------------------------------------------------------------------


def test_plans_know_what_was_learned(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes((FAMILIES / "olmoe.gguf").read_bytes())
    least, _ = bounds(path, context=128)

    def planned() -> Any:
        prepared = prepare(path, context=128, threads=1, target=None, budget=least)
        return prepared, memory_plan(prepared)

    prepared, plan = planned()
    room = prepared.room
    assert room is not None and plan.experts == prepared.slots
    share = prepared.slots / room.count
    assert plan.expected_hit_rate == share and plan.expected_early_hit_rate is None
    assert "uniform" in plan.routing and any("uniform" in one for one in plan.notices())
    uniform = prepared.expert_bytes(1)
    uses = sum(one.active for one in prepared.decoder.mixtures().values())
    assert uniform == int(uses * (1 - share) * room.n_bytes / room.count)

    trace = record(path, TEXT, tokens=64, threads=2)
    few = np.array([(0.0, 0.9, 0.2, 0.5), (1.0, 0.9, 0.2, 0.5)], np.float32)
    learned = learn(trace, few)
    learned.write(statistics_path(path))
    prepared, plan = planned()
    assert plan.expected_hit_rate == pytest.approx(0.9)
    assert plan.expected_early_hit_rate == pytest.approx(0.5)
    assert any("90% of the uses (50% of the first 128 tokens')" in one for one in plan.notices())
    assert plan.routing == "as in 64 tokens of text"
    assert prepared.expert_bytes(1) == pytest.approx(uses * 0.2 * room.n_bytes / room.count, abs=1)
    shares = [f[: len(m.each)] for f, m in zip(
        learned.frequency, prepared.decoder.mixtures().values(), strict=True
    )]  # fmt: skip
    visits = sum((1 - (1 - s.astype(float)) ** 20).sum() for s in shares)
    expected = visits * (1 - share) * room.n_bytes / room.count
    assert prepared.expert_bytes(20) == pytest.approx(expected, abs=1)
    # A compressed file has the same routers: its statistics are those of its source.
    small = compress(path, tmp_path / "small.gguf", format="q8_0").path
    found = prepare(small, context=128, threads=1, target=None).learned
    assert found is not None and found.model == learned.model

    for content, why in (
        (b"something else", "record it again"), (None, "of another model"),
    ):  # fmt: skip
        if content is None:
            replace(learned, model="1" * 64).write(statistics_path(path))
        else:
            statistics_path(path).write_bytes(content)
        prepared, plan = planned()
        assert plan.expected_hit_rate == share and prepared.learned is None
        assert sum(why in one for one in plan.notices()) == 1
        assert prepared.expert_bytes(1) == uniform

    beside = statistics_path(path)
    for make, why in (
        (beside.mkdir, "a directory, not a file with statistics of routes"),
        (partial(os.mkfifo, beside), "a FIFO, not a regular file"),
        (partial(beside.symlink_to, beside), "Too many levels of symbolic links"),
    ):
        beside.rmdir() if beside.is_dir() else beside.unlink()
        make()
        prepared, plan = planned()
        assert plan.expected_hit_rate == share and prepared.learned is None
        assert sum(why in one for one in plan.notices()) == 1


def test_what_comes_late_is_no_hit() -> None:
    """Of what is asked for ahead, as much is there as flash brings in the time that passes."""
    n_bytes, bytes_s = 1_000_000, 1e9 / FLASH_SHARE  # 1 ms a token
    rates = Rates(flash={MODES[0]: FlashRate(bytes_s, 0.0)}, sample=Sample(2e-3, 16, 4e-3))
    for compute_s, missed, expected in ((2e-3, 0.0, 1.0), (4e-4, 0.0, 0.4), (4e-4, 0.25, 0.65)):
        sample = Sample(compute_s, 16, 4e-3)
        passes = Passes(replace(rates, sample=sample), None, 0, 1, lambda n: n_bytes)
        assert passes.in_time(missed) == pytest.approx(expected)
    assert Passes(Rates(), None, 0, 1, lambda n: n_bytes).in_time(0.0) == 1
    asked: list[float] = []

    def half(missed: float) -> float:
        asked.append(missed)
        return 0.5

    # 0.5 of the uses are read ahead, of which the others in vain; 0.3 are not asked for.
    assert hits_in_time((0.7, 0.8), half) == pytest.approx(0.7 - USEFUL * 0.5 / 2)
    assert asked == [pytest.approx(0.3 / 0.8)]
    assert hits_in_time((0.25, 0.75), half) == pytest.approx(0.25)  # nothing is read ahead
    assert hits_in_time((1.0, 0.0), half) == 1


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, out = tmp_path / "m.gguf", tmp_path / "t.txt", tmp_path / "t.routes"
    model.write_bytes((FAMILIES / "mixtral.gguf").read_bytes())
    text.write_text(TEXT)
    assert main(["trace", str(model), str(text), "--tokens", "64"]) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert main(["trace", str(model), str(text), "-o", str(out), "--tokens", "64", "--learn"]) == 0
    assert read_trace(out).chosen.shape[0] == 64
    learned: RouteStatistics = read_statistics(statistics_path(model))
    assert learned.tokens == 64 and learned.model == read_trace(out).model


def test_only_a_record_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, out = tmp_path / "m.gguf", tmp_path / "t.txt", tmp_path / "t.routes"
    model.write_bytes((FAMILIES / "mixtral.gguf").read_bytes())
    text.write_text(TEXT)
    what = ["trace", str(model), str(text), "--tokens", "64", "-o"]
    for wrong, said in (
        (model, "exists; name another file"),
        (text, "exists; name another file"),
        (tmp_path, "exists; name another file"),
        (tmp_path / "none" / "t.routes", "is not a directory; make it first"),
        (statistics_path(model), "where --learn keeps statistics"),
    ):
        assert main([*what, str(wrong)]) == 2
        assert said in capsys.readouterr().err
    assert model.read_bytes() == (FAMILIES / "mixtral.gguf").read_bytes()
    assert text.read_text() == TEXT
    assert sorted(tmp_path.iterdir()) == [model, text]
    for tokens in (64, 32):
        assert main([*what, str(out), "--tokens", str(tokens)]) == 0
        assert len(read_trace(out).chosen) == tokens


def test_a_directory_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mixtral"
    (folder / "below").mkdir(parents=True)
    beside = tmp_path / "mixtral.routes"
    assert statistics_path(folder) == beside
    monkeypatch.chdir(folder)
    (folder / "m.gguf").write_bytes((FAMILIES / "mixtral.gguf").read_bytes())
    assert main(["plan", "."]) == 0
    assert statistics_path(Path()) == beside
    monkeypatch.chdir(folder / "below")
    assert statistics_path(Path("..")) == beside
