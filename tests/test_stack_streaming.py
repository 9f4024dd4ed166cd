"""Stacks whose last blocks are read for every pass: the bits of the whole stack, in less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_check import check

import headrace
from headrace.errors import BudgetError
from headrace.memory_plan import plan_model
from headrace.model import Model
from headrace.offload import pieces
from headrace.offload.prefix import keep_first, least_bytes
from headrace.targets.host import pick_target
from headrace.write_stack import write_stack

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
IDS = [1, 403, 407, 261, 378, 432, 285, 286, 261, 400, 31, 72, 80, 90, 100, 110, 120, 130, 140, 150]
LEVELS = 12
PROMPT = [1, 403, 407, 261, 378]


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of which a small model has a use."""
    monkeypatch.setattr(pieces, "HUGE_PAGE", pieces.PAGE)
    monkeypatch.setattr("headrace.choices.PIECE_BYTES", 0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a stack of 12 levels."""
    found = tmp_path_factory.mktemp("stack") / "stories.gguf"
    write_stack(STORIES, found, rank=1, levels=LEVELS)
    return found


def load(path: Path, **options: object) -> Model:
    return headrace.load(path, context=64, **options)  # type: ignore[arg-type]


def streaming(path: Path, share: float = 0.0, **options: object) -> Model:
    """The whole stack in as little memory as it can have, and `share` of what is between."""
    with pytest.raises(BudgetError) as refused:
        load(path, memory="40MB", whole_stack=True, **options)
    least = refused.value.needed_bytes
    assert least is not None
    whole = plan_model(path, context=64, measure=False).peak_bytes
    memory = int(least + share * (whole - least))
    model = load(path, memory=memory, whole_stack=True, **options)
    assert model.streams and model.plan.peak_bytes <= memory
    return model


def test_logits_are_those_of_the_whole_stack(path: Path) -> None:
    with load(path) as model:
        tokens = (20, 8, 1)
        expected = [model.logits(IDS[:n]) for n in tokens]
        everything = len(model.blocks)
    counts = []
    for share in (0.0, 0.4, 0.8):
        with streaming(path, share) as model:
            counts.append(len(model.blocks))
            for n, wanted in zip(tokens, expected, strict=True):
                assert np.array_equal(model.logits(IDS[:n]), wanted)
            assert model.stall_s >= 0
    assert counts == sorted(counts) and counts[-1] < everything
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("target", [None, "x86-64-v3"])
def test_checked_tokens_equal_decode(path: Path, target: str | None) -> None:
    if target is not None and pick_target().name.split("-")[0] != "x86":
        pytest.skip("for x86")
    with streaming(path, target=target) as model:
        for tokens in (2, 16):
            check(model, 3, tokens)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_guesses_of_the_blocks_in_memory_change_no_token(path: Path, share: float) -> None:
    with load(path) as model:
        expected = model.generate(PROMPT, max_tokens=40)
        expected.text()
        warm = {"temperature": 0.8, "seed": 3, "max_tokens": 40}
        sampled = model.generate(PROMPT, **warm)  # type: ignore[arg-type]
        sampled.text()
    with streaming(path, share) as model:
        for wanted, options in ((expected, {"max_tokens": 40}), (sampled, warm)):
            found = model.generate(PROMPT, draft="self", **options)  # type: ignore[arg-type]
            found.text()
            assert found.ids == wanted.ids
            assert found.stats.passes + found.stats.accepted_tokens == len(found.ids) - 1
            if wanted is expected and share:
                assert found.stats.accepted_tokens > 3
        chat_like = model.generate(expected.ids, max_tokens=8, draft="self")
        chat_like.text()


def test_guessing_leaves_what_was_read_as_it_was(path: Path) -> None:
    with load(path) as whole, streaming(path) as model:
        for one in (whole, model):
            one.read_tokens(IDS[:5])
        guessed = model._guess(IDS[:6], 4)
        assert len(guessed) == 4 and model._kept == IDS[:5]
        assert whole._guess(IDS[:6], 4) == []  # nothing streams: nothing is left out
        for one in (whole, model):
            one.read_tokens(IDS[5:6], 5)
        assert np.array_equal(model._logits(), whole._logits())
    # The guesses are those of a stack that has no more blocks.
    with streaming(path) as model:
        count, beside = len(model.blocks), sum(model.prepared.parts.values())
        beside -= model.prepared.parts["window"] + model.prepared.parts["weights"]
        model.read_tokens(IDS[:5])
        for i in range(5):  # keys and values, too, would be other ones
            del model._kept[i:]
            program = model._programs.guess
            assert program is not None
            model._run_chunk([IDS[i]], i, 1, model._programs.logits, program)
        guessed = model._guess(IDS[:6], 3)
    with load(path) as fewer:
        stack = fewer.prepared.stack
        assert stack is not None
        fixed = sum(fewer.prepared.parts.values()) - stack.n_bytes(len(stack))
        fewer.memory = fixed + stack.n_bytes(count)
        assert len(fewer.blocks) == count
        for i in range(5):
            fewer.read_tokens(IDS[i : i + 1], i)
        assert fewer.likeliest(IDS[:6], 3) == guessed


def test_memory_changes_while_it_streams(path: Path) -> None:
    with load(path) as model:
        expected = model.logits(IDS)
    with streaming(path, 0.3) as model:
        before = len(model.blocks)
        everything = model.plan.peak_bytes * 2
        assert np.array_equal(model.logits(IDS), expected)
        model.memory = everything
        assert not model.streams
        assert np.array_equal(model.logits(IDS), expected)
        assert "".join(model.generate(PROMPT, max_tokens=8, draft="self"))
        least = model.memory
        with pytest.raises(BudgetError) as refused:
            model.memory = "40MB"
        assert refused.value.needed_bytes is not None
        least = refused.value.needed_bytes
        model.memory = least
        assert model.streams and len(model.blocks) < before
        assert np.array_equal(model.logits(IDS), expected)


def test_the_plan_says_what_is_read(path: Path) -> None:
    with streaming(path) as model:
        plan = model.plan
        stack = model.prepared.stack
        assert stack is not None
        streamed = sum(one.info.n_bytes for one in stack.blocks[plan.blocks :])
        assert plan.flash_bytes_per_token == streamed and not plan.all_in_memory
        assert plan.blocks_in_file == len(stack)
        assert plan.bytes_per_token == model.prepared.read_bytes
    whole = plan_model(path, whole_stack=True, context=64, measure=False)
    assert whole.all_in_memory and whole.flash_bytes_per_token == 0


def test_what_streams_goes_round_in_the_slots(path: Path) -> None:
    with load(path) as model:
        stack = model.prepared.stack
    assert stack is not None
    ranked = stack.ranked()
    least = least_bytes(ranked)
    assert least is not None and keep_first(ranked, least - 1) is None
    for budget in range(least, stack.n_bytes(len(stack)) + (1 << 20), 10_000):
        found = keep_first(ranked, budget)
        assert found is not None
        n = len(found.kept)
        assert found.kept == ranked.pieces[:n] and n >= stack.least
        assert len(found.streamed) % found.slots == 0 and n + len(found.streamed) == len(stack)
        assert found.kept_bytes + found.window_bytes <= budget
        names = [piece.matrix for piece in found.streamed]
        wanted = [
            f"{matrix}.block{level}"
            for matrix in stack.matrices
            for level in range(LEVELS)
            if f"{matrix}.block{level}" in names
        ]
        assert names == wanted  # the order of a pass
        by_matrix = [name.rpartition(".")[0] for name in names]
        assert max(map(by_matrix.count, by_matrix)) < found.slots
