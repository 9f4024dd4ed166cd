"""Prompt lookup: the matcher, the choice of how much to check, and that no token changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace
from headrace import generation as generations
from headrace.errors import BusyError, HeadraceError
from headrace.generation import Generation
from headrace.lookup import LONGEST, SIZES, Draft, Lookup
from headrace.model import Model
from headrace.pace import MOST_DRAFTED, Acceptance, PassTimes, tokens_to_check

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"

# --- the matcher ----------------------------------------------------------------------------------


def reference(tokens: list[int], most: int) -> Draft:
    """The latest earlier place of the longest run of `SIZES`, found by looking everywhere."""
    n = len(tokens)
    for size in SIZES:
        for end in range(n - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[n - size :]:
                text = list(tokens)
                for i in range(most):
                    text.append(text[end + i])
                equal = 0
                while equal < min(end, LONGEST) and tokens[end - 1 - equal] == tokens[-1 - equal]:
                    equal += 1
                return Draft(text[n:], equal)
    return Draft([], 0)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, MOST_DRAFTED))
def test_drafts_equal_the_reference(tokens: list[int], most: int) -> None:
    lookup = Lookup(tokens[: len(tokens) // 2])
    for token in tokens[len(tokens) // 2 :]:
        lookup.push(token)
    assert lookup.draft(most) == reference(tokens, most)


def test_the_longest_match_wins_then_the_latest() -> None:
    assert Lookup([1, 2, 3, 4, 9, 3, 5, 1, 2, 3]).draft(2) == Draft([4, 9], 3)
    assert Lookup([3, 4, 3, 5, 3]).draft(1) == Draft([5], 1)
    assert Lookup([1, 2, 1, 2, 1]).draft(5) == Draft([2, 1, 2, 1, 2], 3)
    assert Lookup([1, 2, 3]).draft(5) == Draft([], 0)
    assert Lookup([]).draft(5) == Draft([], 0)


def test_a_long_prompt_is_indexed_fast() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 100_000).tolist()
    began = time.perf_counter()
    Lookup(tokens)
    assert time.perf_counter() - began < 5


# --- how much to check ----------------------------------------------------------------------------


def learned(right: bool, draft: Draft, times: int = 200) -> Acceptance:
    acceptance = Acceptance()
    for _ in range(times):
        acceptance.add(draft, [t if right else t + 1 for t in draft.tokens])
    return acceptance


def timed(seconds: dict[int, float]) -> PassTimes:
    times = PassTimes()
    for _ in range(3):
        for n, s in seconds.items():
            times.add(n, s)
    return times


DRAFT = Draft(list(range(MOST_DRAFTED)), 3)


def test_nothing_is_checked_before_a_pass_was_timed() -> None:
    assert tokens_to_check(DRAFT, learned(True, DRAFT), PassTimes()) == 0
    assert tokens_to_check(Draft([], 0), Acceptance(), timed({1: 1.0})) == 0


def test_all_is_checked_where_passes_take_no_longer() -> None:
    assert tokens_to_check(DRAFT, learned(True, DRAFT), timed({1: 1.0, 16: 1.0})) == MOST_DRAFTED


def test_nothing_is_checked_where_drafts_are_wrong_or_passes_slow() -> None:
    times = timed({1: 1.0, 2: 1.2, 16: 2.0})
    assert tokens_to_check(DRAFT, learned(False, DRAFT), times) == 0
    slow = timed({n: float(n) for n in range(1, 17)})
    assert tokens_to_check(DRAFT, learned(True, DRAFT), slow) == 0


def test_as_many_as_pay() -> None:
    """Five cost as much as one; beyond, each costs as much as all of them."""
    times = timed({1: 1.0, 5: 1.0, 6: 2.0, 16: 22.0})
    assert tokens_to_check(DRAFT, learned(True, DRAFT), times) == 4


def test_wrong_drafts_that_are_not_read_are_still_counted() -> None:
    """So a text that begins to repeat itself is noticed without reading drafts for nothing."""
    times = timed({1: 1.0, 2: 1.3, 16: 3.0})
    acceptance = learned(False, DRAFT)
    assert tokens_to_check(DRAFT, acceptance, times) == 0
    for _ in range(100):
        acceptance.add(DRAFT, DRAFT.tokens[:1])
        acceptance.add(Draft(DRAFT.tokens, LONGEST), DRAFT.tokens[:1])
        for matched in range(4, LONGEST):
            acceptance.add(Draft(DRAFT.tokens, matched), DRAFT.tokens[:1])
    assert tokens_to_check(DRAFT, acceptance, times) > 0


def test_times_lie_between_what_was_measured() -> None:
    times = timed({1: 1.0, 5: 2.0})
    assert times.expected(3) == pytest.approx(1.5)
    assert times.expected(9) == pytest.approx(3.0)
    assert PassTimes().expected(4) is None
    assert timed({1: 1.0}).expected(16) == 1.0


def test_one_bad_measurement_is_forgotten() -> None:
    times = PassTimes()
    times.add(1, 1.0)
    times.add(16, 1000.0)
    assert times.expected(16) == 1000.0
    for _ in range(100):
        times.add(1, 1.0)
    assert times.expected(16) == 1.0


# --- generating: the same with and without --------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> Iterator[Model]:
    with headrace.load(STORIES, threads=2) as model:
        yield model


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole drafts are checked, whatever that takes: so every case of accepting them comes up."""
    monkeypatch.setattr(generations, "tokens_to_check", lambda draft, *_: len(draft.tokens))


class Told(Lookup):
    """Drafts what is known to come, but for every seventh token."""

    script: ClassVar[list[int]] = []

    def draft(self, most: int) -> Draft:
        n = len(self._tokens)
        right = enumerate(self.script[n : n + most], n)
        return Draft([token if i % 7 else token ^ 1 for i, token in right], LONGEST)


@pytest.fixture
def told(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of each draft is accepted, so that whatever happens falls into one."""
    monkeypatch.setattr(generations, "Lookup", Told)


PROMPT = "Once upon a time there was a little dog. The little dog was happy. The little dog"
SAMPLING: list[dict[str, Any]] = [
    {},
    {"repeat_penalty": 1.1},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 0.4, "seed": 2, "top_k": 20, "repeat_penalty": 1.05},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9, "min_p": 0.02},
]


def both(model: Model, prompt: Any, **options: Any) -> tuple[Generation, Generation]:
    """The same generation without and with lookup, and what the model remembers afterwards."""
    found, texts, kept = [], [], []
    for lookup in (False, True):
        generation = model.generate(prompt, raw=True, lookup=lookup, **options)
        texts.append(list(generation))
        kept.append(list(model._kept))
        found.append(generation)
        Told.script = [*generation._recent, *[0] * MOST_DRAFTED]
    plain, guessed = found
    assert guessed.ids == plain.ids
    assert texts[0] == texts[1]  # piece by piece
    assert kept[0] == kept[1]
    assert plain.stats.finish_reason == guessed.stats.finish_reason
    assert plain.stats.new_tokens == guessed.stats.new_tokens == len(plain.ids)
    assert plain.stats.passes == len(plain.ids) - 1 and plain.stats.accepted_tokens == 0
    assert guessed.stats.passes + guessed.stats.accepted_tokens == len(plain.ids) - 1
    return plain, guessed


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_the_same_tokens(stories: Model, options: dict[str, Any]) -> None:
    _, guessed = both(stories, PROMPT, max_tokens=200, **options)
    assert guessed.stats.accepted_tokens > 5
    assert guessed.stats.tokens_per_pass > 1


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_the_same_tokens_at_its_own_pace(stories: Model, options: dict[str, Any]) -> None:
    for _ in range(2):
        both(stories, PROMPT, max_tokens=150, **options)


@pytest.mark.usefixtures("told")
def test_max_tokens_within_a_draft(stories: Model) -> None:
    for n in range(1, 40):
        plain, guessed = both(stories, PROMPT, max_tokens=n)
        assert len(plain.ids) == n
        assert guessed.stats.passes <= n // 7 + 2


@pytest.mark.usefixtures("told")
def test_stop_strings_within_a_draft(stories: Model) -> None:
    text = stories.generate(PROMPT, raw=True, max_tokens=80, lookup=False).text()
    for at in range(5, 60, 3):
        plain, guessed = both(stories, PROMPT, max_tokens=80, stop=text[at : at + 4])
        assert plain.stats.finish_reason == "stop"
        assert guessed.stats.accepted_tokens >= len(plain.ids) // 2 - 1


@pytest.mark.usefixtures("told")
def test_the_end_of_the_context_within_a_draft(stories: Model) -> None:
    ids = stories.tokenize(PROMPT)
    ids = (ids * 40)[: stories.context]
    for left in range(20):
        both(stories, ids[: stories.context - left], max_tokens=100)


@pytest.mark.usefixtures("told")
def test_the_end_of_the_text_within_a_draft(
    stories: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any token may stand for the end; drafts go on behind it."""
    ids = stories.generate(PROMPT, raw=True, max_tokens=60, lookup=False).ids
    for end in sorted(set(ids[2:])):
        monkeypatch.setattr(stories.tokenizer, "eos_ids", frozenset({end}))
        plain, guessed = both(stories, PROMPT, max_tokens=80)
        assert plain.stats.finish_reason == "eos" and plain.ids[-1] == end
        assert guessed.stats.accepted_tokens >= len(plain.ids) // 2 - 1


@pytest.mark.usefixtures("told")
def test_cancelling_within_a_draft(stories: Model) -> None:
    """No token comes after `cancel`, though it is chosen already; the model can go on."""
    both(stories, PROMPT, max_tokens=100)
    for n in (1, 3, 8, 9, 10, 11):
        generation = stories.generate(PROMPT, raw=True, max_tokens=100, lookup=True)
        for _ in range(n):
            next(generation)
        before = len(generation.ids)
        stories.cancel()
        generation.text()
        assert generation.stats.finish_reason == "cancelled"
        assert len(generation.ids) == before
    both(stories, PROMPT, max_tokens=30)


@pytest.mark.usefixtures("told")
def test_another_generation_takes_over_within_a_draft(stories: Model) -> None:
    expected = both(stories, PROMPT, max_tokens=30)[0].ids
    for n in (8, 9, 10, 11):
        old = stories.generate(PROMPT, raw=True, max_tokens=100, lookup=True)
        for _ in range(n):
            next(old)
        new = stories.generate(PROMPT, raw=True, max_tokens=30, lookup=True)
        new.text()
        assert new.ids == expected
        with pytest.raises(BusyError, match="newer generation"):
            old.text()


@pytest.mark.usefixtures("told")
def test_damaged_logits_within_a_draft(stories: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens before them come out first, as they do one by one."""
    results = []
    for lookup in (False, True):
        generation = stories.generate(PROMPT, raw=True, max_tokens=60, lookup=lookup)
        honest = generation._sampler.sample

        def sample(logits: np.ndarray, recent: list[int], honest: Any = honest) -> int:
            if len(recent) >= 40:
                raise HeadraceError("damaged")
            return int(honest(logits, recent))

        monkeypatch.setattr(generation._sampler, "sample", sample)
        with pytest.raises(HeadraceError, match="damaged"):
            generation.text()
        results.append(generation.ids)
    assert len(results[0]) > 5
    assert results[0] == results[1]


def test_lookup_is_a_switch(stories: Model) -> None:
    assert stories.generate("Once", raw=True).lookup is stories.streams is False
    assert stories.generate("Once", raw=True, lookup=np.True_).lookup is True
    for bad in (1, "yes", 0.0):
        with pytest.raises(TypeError, match="lookup must be True or False"):
            stories.generate("Once", raw=True, lookup=bad)  # type: ignore[arg-type]


@pytest.mark.usefixtures("eager")
def test_chats_remember_the_same(smollm2_path: Path) -> None:
    found = []
    with headrace.load(smollm2_path, threads=2, context=512) as model:
        for lookup in (False, True):
            model.forget()
            chat, stats = model.chat(), []
            for text in ("Say: red, green, blue, red, green, blue.", "Say it again."):
                reply = chat.send(text, max_tokens=24, lookup=lookup)
                reply.text()
                stats.append((reply.stats.reused_tokens, reply.stats.finish_reason))
            found.append((chat.messages, stats, model._kept))
    assert found[0] == found[1]
    assert found[0][1][1][0] > 0


# --- drafts from another model ----------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Model]:
    """The same model in a file of its own: all that it guesses is right, but for rounding."""
    with headrace.load(STORIES, threads=1, activations="f32") as model:
        yield model


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3, "repeat_penalty": 1.1}])
def test_a_draft_changes_no_token(small: Model, options: dict[str, Any]) -> None:
    with headrace.load(STORIES, threads=1) as model:
        for prompt in ("Once upon a time", "The cat said"):
            plain = model.generate(prompt, raw=True, max_tokens=60, lookup=False, **options)
            text = plain.text()
            drafted = model.generate(prompt, raw=True, max_tokens=60, draft=small, **options)
            assert (drafted.text(), drafted.ids) == (text, plain.ids)
            assert drafted.stats.finish_reason == plain.stats.finish_reason


def test_a_draft_saves_passes(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "tokens_to_check", lambda draft, *_: len(draft.tokens))
    with headrace.load(STORIES, threads=1) as model:
        drafted = model.generate("Once upon a time", raw=True, max_tokens=60, draft=small)
        drafted.text()
        assert drafted.stats.passes < 20
        assert drafted.stats.accepted_tokens + drafted.stats.passes == 59


def test_a_draft_of_other_tokens_is_refused(small: Model) -> None:
    with headrace.load(STORIES, threads=1) as model:
        with pytest.raises(ValueError, match="same vocabulary"):
            model.generate("Once", raw=True, draft=model)
        model._metadata = {**model._metadata, "tokenizer.ggml.tokens": None}
        with pytest.raises(ValueError, match="same vocabulary"):
            model.generate([1], draft=small)


def test_a_draft_with_a_shorter_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "tokens_to_check", lambda draft, *_: len(draft.tokens))
    with (
        headrace.load(STORIES, threads=1) as model,
        headrace.load(STORIES, threads=1, context=20) as small,
    ):
        plain = model.generate("Once upon a time", raw=True, max_tokens=60, lookup=False)
        plain.text()
        drafted = model.generate("Once upon a time", raw=True, max_tokens=60, draft=small)
        drafted.text()
        assert drafted.ids == plain.ids


def test_a_draft_that_ends_early_does_not_end_the_text(
    small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "tokens_to_check", lambda draft, *_: len(draft.tokens))
    with headrace.load(STORIES, threads=1) as model:
        plain = model.generate("Once upon a time", raw=True, max_tokens=60, lookup=False)
        plain.text()
        drafted = model.generate("Once upon a time", raw=True, max_tokens=60, draft=small)
        next(drafted)
        small.close()
        with pytest.warns(RuntimeWarning, match="without a draft"):
            drafted.text()
        assert drafted.ids == plain.ids
