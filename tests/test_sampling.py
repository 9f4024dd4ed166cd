"""Samplers against a plain float64 computation; stop strings against every way of cutting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import HeadraceError
from headrace.sampling import Sampler, SamplingParams, StopMatcher

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.0], np.float32)


def allowed(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Tokens that may be drawn and their probability, by definition."""
    order = sorted(range(len(logits)), key=lambda each: (-logits[each], each))
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(np.array([logits[each] for each in order], np.float64) - logits.max())
    running = np.cumsum(weights / weights.sum())
    order = order[: int(np.searchsorted(running, params.top_p - 1e-9)) + 1]
    if params.min_p:
        least = logits.max() + np.log(params.min_p)
        order = [each for each in order if logits[each] >= least]
    weights = np.array(
        [np.exp((logits[each] - logits.max()) / params.temperature) for each in order]
    )
    return dict(zip(order, weights / weights.sum(), strict=True))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=1.0, top_k=3, seed=3),
        SamplingParams(temperature=1.0, top_p=0.7, seed=4),
        SamplingParams(temperature=2.0, min_p=0.2, seed=5),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.95, min_p=0.05, seed=6),
    ],
)
@pytest.mark.parametrize("n_vocab", [6, 700])
def test_frequencies(params: SamplingParams, n_vocab: int) -> None:
    logits = np.full(n_vocab, -20.0, np.float32)
    logits[-6:] = LOGITS  # beyond the first block of a large vocabulary
    expected = allowed(logits, params)
    sampler, draws = Sampler(params), 4000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=n_vocab)
    for token in range(n_vocab):
        p = expected.get(token, 0.0)
        slack = 5 * np.sqrt(draws * p * (1 - p)) + (1e-3 * draws if p else 0)
        assert abs(counts[token] - draws * p) <= slack, (token, counts[token], draws * p)


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler().sample(LOGITS) == 1
    assert Sampler(SamplingParams(temperature=1.0, top_k=1)).sample(LOGITS) == 1


def test_top_k_keeps_the_lowest_of_equals() -> None:
    logits = np.zeros(100, np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=3, seed=0))
    assert {sampler.sample(logits) for _ in range(100)} == {0, 1, 2}


def test_seed_decides() -> None:
    params = SamplingParams(temperature=1.0, seed=42)
    first, second = Sampler(params), Sampler(params)
    assert [first.sample(LOGITS) for _ in range(50)] == [second.sample(LOGITS) for _ in range(50)]


def test_repeat_penalty() -> None:
    logits = LOGITS.copy()
    sampler = Sampler(SamplingParams(repeat_penalty=2.0, repeat_window=2))
    assert sampler.sample(logits, [1]) == 3
    assert sampler.sample(logits, [1, 3]) == 2
    assert sampler.sample(logits, [1, 1, 3]) == 2  # twice in the text, penalised once
    assert sampler.sample(logits, [1, 3, 5, 5]) == 1  # out of the window
    negative = np.array([-1.0, -1.5], np.float32)
    assert sampler.sample(negative, [0]) == 1
    assert (logits == LOGITS).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[4] = bad
    with pytest.raises(HeadraceError, match="at token 4"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)
    with pytest.raises(HeadraceError, match="finite"):
        Sampler(SamplingParams(temperature=temperature)).sample(np.full(5, -np.inf, np.float32))


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 998]] = 0.0
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    assert {sampler.sample(logits) for _ in range(200)} == {3, 998}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repeat_penalty", 0.0),
        ("repeat_window", -1),
        ("seed", -1),
    ],
)
def test_ranges(field: str, value: float) -> None:
    with pytest.raises(
        ValueError, match=f"{field} (is {value!r}, expected|must be at least 0, not {value!r})"
    ):
        SamplingParams(**{field: value})


# --- stop strings ---


def by_definition(text: str, stops: list[str]) -> str:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    expected = by_definition("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert expected.startswith(shown)
    assert shown + matcher.finish() == expected
    assert matcher.stopped == any(stop in "".join(pieces) for stop in stops)


def test_stop_is_held_back_only_while_it_may_come() -> None:
    matcher = StopMatcher(["###", "\nUser:"])
    assert matcher.push("Hello\nUs") == "Hello"
    assert matcher.push("eless #") == "\nUseless "
    assert matcher.push("#") == ""
    assert matcher.push("#tail") == ""
    assert matcher.matched == "###" and matcher.stopped
    assert matcher.push("more") == "" and matcher.finish() == ""


def test_bad_stop_strings() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
    with pytest.raises(ValueError, match="list of strings"):
        StopMatcher("abc")
