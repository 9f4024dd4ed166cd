"""Which weights stay: what is kept fits, what streams goes round, and the least is the least."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import BudgetError
from headrace.offload.budget import Choice, Limit, fit
from headrace.offload.modes import MODES, choose
from headrace.offload.pieces import LEAST_SLOTS, Cuttable, cut, keep, least_bytes, spread
from headrace.prediction import Rates, prediction

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
    assert choose({first: 3.0, second: 3.2}) is first
    assert choose({first: 2.0, second: 3.2}) is second


def test_the_slower_of_disk_and_compute_is_predicted() -> None:
    pieces = cut([Cuttable("m", 10_000, 36_864, 36_864, 368_640_000, True)])
    residency = keep(pieces, 100 << 20)
    assert residency is not None

    def predict(**rates: float) -> float:
        speed = prediction(Rates(**rates), residency, read_bytes=368_640_000, prompt_tokens=128)
        assert speed.tok_s is not None
        return speed.tok_s

    slow, fast = predict(memory=50e9, flash=1e9), predict(memory=50e9, flash=2e9)
    assert fast == pytest.approx(2 * slow)
    assert slow == pytest.approx(0.95e9 / residency.streamed_bytes)
    assert predict(memory=50e9, flash=1e12) < 50e9 / 368_640_000
    assert prediction(Rates(), None, read_bytes=1, prompt_tokens=128).tok_s is None
