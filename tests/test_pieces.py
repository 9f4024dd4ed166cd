"""Which weights stay: what is kept fits, what streams goes round, and the least is the least."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import BudgetError
from headrace.offload.budget import Choice, Limit, fit
from headrace.offload.modes import FLASH_SHARE, MODES, FlashRate, ReadMode, Work, choose
from headrace.offload.pieces import LEAST_SLOTS, Cuttable, cut, keep, least_bytes, spread
from headrace.offload.revision import PASSES, Revision
from headrace.prediction import Passes, Rates, Sample, Speed

matrices = st.lists(
    st.builds(
        lambda tiles, tile_bytes, straight: Cuttable(
            f"m{tiles}.{tile_bytes}", tiles, tile_bytes, tile_bytes + 16, tiles * tile_bytes - 5,
            straight,
        ),
        st.integers(1, 300), st.integers(64, 40_000), st.booleans(),
    ),
    min_size=1, max_size=20, unique_by=lambda m: m.name,
)  # fmt: skip


@given(matrices)
def test_pieces_make_up_the_matrices(found: list[Cuttable]) -> None:
    pieces = cut(found)
    for matrix in found:
        own = [piece for piece in pieces if piece.matrix == matrix.name]
        assert [piece.tile for piece in own] == list(
            np.cumsum([0, *(piece.tiles for piece in own)])[:-1]
        )
        assert sum(piece.tiles for piece in own) == matrix.tiles
        assert sum(piece.read_bytes for piece in own) == matrix.file_bytes
        assert sum(piece.kept_bytes for piece in own) == matrix.tiles * matrix.kept_bytes
        assert all(piece.start == piece.tile * matrix.read_bytes for piece in own)


@given(matrices, st.floats(0, 1.2))
def test_what_is_kept_fits_and_what_streams_goes_round(found: list[Cuttable], share: float) -> None:
    pieces = cut(found)
    budget = int(share * sum(piece.kept_bytes for piece in pieces)) + (3 << 20)
    residency = keep(pieces, budget)
    if residency is None:
        assert len(pieces) < LEAST_SLOTS or budget < least_bytes(pieces)
        return
    assert residency.kept_bytes + residency.window_bytes <= budget
    assert len(residency.streamed) % residency.slots == 0
    assert residency.slots >= LEAST_SLOTS
    assert sorted([*residency.kept, *residency.streamed], key=pieces.index) == pieces
    assert list(residency.streamed) == sorted(residency.streamed, key=pieces.index)
    assert all(piece.room_bytes + 4096 <= residency.slot_bytes for piece in residency.streamed)


@given(matrices)
def test_the_least_is_the_least(found: list[Cuttable]) -> None:
    pieces = cut(found)
    if len(pieces) >= LEAST_SLOTS:
        least = least_bytes(pieces)
        assert keep(pieces, least) is not None
        assert keep(pieces, least - 1) is None


def test_more_memory_keeps_more() -> None:
    pieces = cut([Cuttable(f"m{i}", 256, 36_864, 36_864, 256 * 36_864, True) for i in range(100)])
    kept = [keep(pieces, budget << 20).kept_bytes for budget in range(50, 800, 10)]  # type: ignore[union-attr]
    assert kept == sorted(kept)
    # All of the memory is used, but for a window and what a whole turn of the slots costs.
    assert kept[-1] > (790 << 20) * 0.85


@pytest.mark.parametrize("n", [10, 97, 1000])
def test_any_beginning_of_the_order_is_spread(n: int) -> None:
    order = spread([None] * n)  # type: ignore[list-item]
    assert sorted(order) == list(range(n))
    for k in (n // 4, n // 2, 3 * n // 4):
        gaps = np.diff(sorted(order[:k]))
        assert gaps.max() <= 2 * np.ceil(n / k)


def choice(context: int, fixed: int, weights: int) -> Choice:
    parts = {"KV cache": context * 100, "the process": fixed}
    return Choice(context, 32, {"weights": weights, **parts}, {"weights": 0, **parts})


def test_everything_in_memory_comes_first() -> None:
    pieces = cut([Cuttable("m", 1000, 9216, 9216, 9_216_000, False)])
    weights = sum(piece.kept_bytes for piece in pieces)
    whole = [choice(4096, 1000, weights), choice(256, 1000, weights)]
    assert fit(Limit(), whole, whole, pieces, "m").residency is None
    exact = Limit(sum(whole[1].whole.values()), "it is small")
    found = fit(exact, whole, whole, pieces, "m")
    assert (found.residency, found.choice.context) == (None, 256)
    less = Limit(sum(whole[1].whole.values()) - 1, "it is small")
    streamed = fit(less, whole, whole[1:], pieces, "m")
    assert streamed.residency is not None
    assert sum(streamed.parts.values()) <= sum(whole[1].whole.values()) - 1
    with pytest.raises(BudgetError, match="it is small") as caught:
        fit(Limit(1000, "it is small"), whole, whole[1:], pieces, "m")
    needed = caught.value.needed_bytes
    assert fit(Limit(needed, ""), whole, whole[1:], pieces, "m")
    with pytest.raises(BudgetError):
        fit(Limit(needed - 1, ""), whole, whole[1:], pieces, "m")


def test_the_first_good_mode_is_taken() -> None:
    first, second, *_ = MODES
    work = Work(10**9, 0.0, threads=2, cores=2)
    assert choose({first: FlashRate(3e9, 0), second: FlashRate(3.2e9, 0)}, work) is first
    assert choose({first: FlashRate(2e9, 0), second: FlashRate(3.2e9, 0)}, work) is second


def test_long_passes_leave_the_cpu_to_those_who_compute() -> None:
    frugal, fast, *_ = MODES
    rates = {frugal: FlashRate(2e9, 0.05e-9), fast: FlashRate(4e9, 0.5e-9)}
    short, long = (Work(2 * 10**9, s, threads=2, cores=2) for s in (0.1, 2.0))
    assert choose(rates, short) is fast
    assert choose(rates, long) is frugal
    assert long.seconds(rates[frugal]) == pytest.approx(2.05)
    assert long.seconds(rates[fast]) == pytest.approx(2.5)
    assert short.seconds(rates[fast]) == pytest.approx(0.6)
    # Where a core is left over, nobody is in the way.
    assert choose(rates, replace(long, threads=1)) is frugal
    assert replace(long, threads=1).seconds(rates[fast]) == pytest.approx(2.0)


def test_the_slower_of_disk_and_compute_is_predicted() -> None:
    pieces = cut([Cuttable("m", 10_000, 36_864, 36_864, 368_640_000, True)])
    residency = keep(pieces, 100 << 20)
    assert residency is not None
    read, mode = 368_640_000, MODES[0]

    def predict(memory: float, flash: float, sample: Sample | None = None) -> Speed:
        rates = Rates(memory, {mode: FlashRate(flash, 0)}, sample, cores=2)
        return Passes(rates, residency, read, 2).prediction(128)

    slow, fast = predict(50e9, 1e9), predict(50e9, 2e9)
    assert slow.tok_s is not None
    assert fast.tok_s == pytest.approx(2 * slow.tok_s)
    assert slow.tok_s == pytest.approx(FLASH_SHARE * 1e9 / residency.streamed_bytes)
    assert slow.mode is mode
    bound = predict(50e9, 1e12).tok_s
    assert bound is not None
    assert bound < 50e9 / read
    assert Passes(Rates(), None, 1, 2).prediction(128).tok_s is None
    assert slow.first_token_s is None  # nothing says how fast prompts are
    # A prompt in chunks takes as many passes.
    reading = residency.streamed_bytes / (FLASH_SHARE * 1e9)
    found = predict(50e9, 1e9, Sample(decode_s=0.01, chunk_tokens=32, chunk_s=0.02))
    assert found.first_token_s == pytest.approx(4 * reading)
    found = predict(50e9, 1e9, Sample(decode_s=0.01, chunk_tokens=128, chunk_s=9.0))
    assert found.first_token_s == pytest.approx(9.0)
    whole = Passes(Rates(sample=Sample(0.01, 64, 0.5), cores=2), None, read, 2).prediction(128)
    assert whole.tok_s == pytest.approx(100)
    assert whole.first_token_s == pytest.approx(1.0)


def test_rates_follow_what_passes_get() -> None:
    direct, buffered = MODES[0], MODES[3]
    revision = Revision({direct: FlashRate(3e9, 0), buffered: FlashRate(2e9, 0)})

    def passes(mode: ReadMode, bytes_s: float, stalled: float = 0.9, n: int = PASSES) -> bool:
        seconds = 1e9 / bytes_s
        return [revision.add(mode, 10**9, seconds, stalled * seconds) for _ in range(n)][-1]

    assert not passes(direct, 2.7e9)  # as was measured
    assert not passes(direct, 0.5e9, stalled=0.1)  # computing binds
    assert not passes(direct, 0.5e9, n=PASSES - 1)
    assert passes(direct, 0.5e9, n=1)
    work = Work(10**9, 0.0, 2, 2)
    assert choose(revision.rates, work) is buffered
    assert passes(buffered, 0.4e9)  # no better: back to the first, and there it stays
    assert choose(revision.rates, work) is direct
    assert not passes(direct, 0.5e9)
    assert passes(direct, 2.8e9)  # the machine is free again
    assert revision.rates[buffered].bytes_s == 2e9
