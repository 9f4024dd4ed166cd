"""Perplexity and the distance of two models, beside the definitions written out in float64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_tiled import write_model

import headrace
from headrace.choices import PROCESS_BYTES
from headrace.compare import compare
from headrace.compress import compress
from headrace.errors import BudgetError, HeadraceError
from headrace.pair import load_pair, shares
from headrace.perplexity import perplexity
from headrace.planning import bounds
from headrace.windows import cut_text

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
TEXT = (
    "Once upon a time there was a little girl called Lily. She liked to play in the park with her "
    "dog. One day the dog ran after a big red ball, and Lily could not find it. She was very sad. "
) * 3
CONTEXT = 64


@pytest.fixture(scope="module")
def exact() -> Iterator[headrace.Model]:
    with headrace.load(STORIES, context=CONTEXT, threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> Iterator[headrace.Model]:
    """The same model, its matrices off by a few percent."""
    path = tmp_path_factory.mktemp("models") / "rough.gguf"
    shutil.copy(STORIES, path)
    rng = np.random.default_rng(1)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.data.ndim == 2:
            assert tensor.data.dtype == np.float32
            tensor.data[:] *= 1 + 0.05 * rng.standard_normal(tensor.data.shape, np.float32)
    with headrace.load(path, context=CONTEXT, threads=2) as model:
        yield model


def windows_by_hand(model: headrace.Model) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [n, vocabulary] of what is scored, and the tokens that came."""
    ids = model.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    found, came = [], []
    for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        window = ids[start : start + CONTEXT]
        logits = model.logits([1, *window[1:]]).astype(np.float64)
        for at in range(CONTEXT // 2, CONTEXT - 1):
            row = logits[at]
            found.append(row - np.log(np.exp(row - row.max()).sum()) - row.max())
            came.append(window[at + 1])
    return np.array(found), np.array(came)


def test_perplexity_is_what_its_definition_says(exact: headrace.Model) -> None:
    log_p, came = windows_by_hand(exact)
    expected = np.exp(-log_p[np.arange(len(came)), came].mean())
    found = perplexity(exact, TEXT, context=CONTEXT)
    assert found["tokens"] == len(came)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_distance_is_what_its_definition_says(exact: headrace.Model, rough: headrace.Model) -> None:
    log_p, came = windows_by_hand(exact)
    log_q, _ = windows_by_hand(rough)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    seen: list[tuple[int, int | None]] = []
    found = compare(
        exact, rough, TEXT, context=CONTEXT, progress=lambda done, of, what: seen.append((done, of))
    )
    assert kl.mean() > 1e-5
    assert found["kl_divergence"] == pytest.approx(kl.mean(), rel=0.02)
    assert found["kl_largest"] == pytest.approx(kl.max(), rel=0.02)
    same = (log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean()
    assert found["top_agreement"] == pytest.approx(same)
    at = np.arange(len(came)), came
    ratio = np.exp((log_p[at] - log_q[at]).mean())
    assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert seen == [(i + 1, found["windows"]) for i in range(found["windows"])]


def test_a_model_equals_itself(rough: headrace.Model) -> None:
    found = compare(rough, rough, TEXT, context=CONTEXT, chunks=1)
    assert found["kl_divergence"] == 0 == found["kl_largest"]
    assert not any(np.signbit(value) for key, value in found.items() if "kl" in key)  # no -0
    assert found["top_agreement"] == found["perplexity_ratio"] == 1
    assert found["windows"] == 1


def test_other_vocabularies_are_refused(rough: headrace.Model, tmp_path: Path) -> None:
    other = write_model(tmp_path / "m.gguf", ["Q8_0"])
    with (
        headrace.load(other, threads=1) as model,
        pytest.raises(HeadraceError, match="different vocabularies"),
    ):
        compare(rough, model, TEXT)


def test_texts_that_are_too_short(rough: headrace.Model) -> None:
    with pytest.raises(HeadraceError, match="less than one window of 64"):
        perplexity(rough, "Once", context=CONTEXT)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        cut_text(rough.tokenizer, TEXT, 3, None)
    with pytest.raises(ValueError, match="at least 1"):
        cut_text(rough.tokenizer, TEXT, CONTEXT, 0)


# --- some logits at a time ---


@pytest.mark.parametrize("name", ["stories260K", "gemma2", "qwen2moe"])
def test_parts_of_a_text_are_the_whole_bit_for_bit(name: str) -> None:
    path = STORIES if name == "stories260K" else STORIES.parent / "families" / f"{name}.gguf"
    with headrace.load(path, context=CONTEXT, threads=2) as model:
        ids = [int(i) for i in np.random.default_rng(2).integers(3, model.vocabulary, CONTEXT)]
        whole = model.logits(ids)
        for step in (1, 16, 31):
            model.forget()
            parts = [
                model.logits_between(ids, at, min(at + step, CONTEXT - 1))
                for at in range(20, CONTEXT - 1, step)
            ]
            assert np.array_equal(np.concatenate(parts), whole[20 : CONTEXT - 1])
        assert np.array_equal(model.logits_between(ids, 20, 30), whole[20:30])  # once more
        with pytest.raises(ValueError, match="no tokens 64 to 65 of 64"):
            model.logits_between(ids, CONTEXT, CONTEXT + 1)
        with pytest.raises(ValueError, match="no tokens 5 to 5"):
            model.logits_between(ids, 5, 5)


def test_little_memory_scores_the_same(rough: headrace.Model) -> None:
    """Also two models together, and one with itself; the fewest logits have room in the least."""
    path, options = rough.prepared.file.paths[0], {"context": CONTEXT, "threads": 2}
    scored = {**options, "logits_rows": CONTEXT // 2}
    least, most = bounds(path, **scored)  # type: ignore[arg-type]
    with headrace.load(path, memory=least, **scored) as small:  # type: ignore[arg-type]
        assert small.logits_at_once == 16
        assert small.plan.peak_bytes <= least
        assert perplexity(small, TEXT, context=CONTEXT) == perplexity(rough, TEXT, context=CONTEXT)
        alike = compare(small, rough, TEXT, context=CONTEXT)
        assert alike["kl_divergence"] == 0 and alike["top_agreement"] == 1
        assert compare(small, small, TEXT, context=CONTEXT) == alike
        small.memory = most
        assert small.logits_at_once == CONTEXT // 2
        small.memory = most - 1
        assert small.logits_at_once == 16
    assert rough.logits_at_once is None


def test_logits_that_have_room_are_no_more_than_counted(
    rough: headrace.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = headrace.Model.logits_between

    def between(model: headrace.Model, ids: list[int], first: int, end: int) -> np.ndarray:
        seen.append(end - first)
        return real(model, ids, first, end)

    monkeypatch.setattr(headrace.Model, "logits_between", between)
    path = rough.prepared.file.paths[0]
    least, _ = bounds(path, context=CONTEXT, threads=2, logits_rows=32)
    with headrace.load(path, memory=least, context=CONTEXT, threads=2, logits_rows=32) as small:
        perplexity(small, TEXT, context=CONTEXT, chunks=1)
    assert seen == [16, 15]


# --- within one budget ----------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A model in float32, and in 4 bits."""
    first = write_model(tmp_path / "f.gguf", ["F32"])
    return first, compress(first, tmp_path / "q.gguf", format="q4_0").path


def test_each_gets_what_it_needs_and_its_share(two: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"context": 64, "threads": 1, "logits_rows": 32}
    (low, high), (low_q, high_q) = (bounds(path, **options) for path in two)
    least, most = low + low_q - PROCESS_BYTES, high + high_q - PROCESS_BYTES
    assert low < high < 2 * PROCESS_BYTES
    assert low_q <= high_q < high
    assert shares(*two, least, options) == (low, low_q)
    assert shares(*two, most + 10**6, options) == (high, high_q)
    between = shares(*two, (least + most) // 2, options)
    assert between == (
        pytest.approx((low + high) / 2, abs=2),
        pytest.approx((low_q + high_q) / 2, abs=2),
    )
    with pytest.raises(BudgetError, match="together") as raised:
        shares(*two, least - 1, options)
    assert raised.value.needed_bytes == least
    with load_pair(*two, memory=least, progress=None, **options) as (a, b):
        assert a.streams
        assert a.plan.peak_bytes + b.plan.peak_bytes - PROCESS_BYTES <= least
        ids = list(range(40))
        assert a.logits(ids).shape == b.logits(ids).shape
