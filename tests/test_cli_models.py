"""What the command decides about models before it loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import headrace
import headrace.model
from headrace import cli

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"


def ran(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What `headrace run` prints as JSON."""
    assert cli.main(["run", *map(str, words), "--raw", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_draft_remembers_no_more_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.gguf"
    shutil.copy(STORIES, small)
    contexts, load = {}, headrace.model.load

    def loading(model: str, **options: Any) -> Any:
        contexts[Path(model).name] = options.get("context")
        return load(model, **options)

    monkeypatch.setattr("headrace.model.load", loading)
    alone = ran(capsys, STORIES, "Once", "-n", "8", "--context", "320")
    drafted = ran(capsys, STORIES, "Once", "-n", "8", "--context", "320", "--draft", small)
    assert drafted["text"] == alone["text"]
    assert contexts == {STORIES.name: 320, small.name: 320}


@pytest.mark.parametrize(
    "words",
    [
        ["run", STORIES, "Once", "--raw", "--whole-stack"],
        ["run", STORIES, "Once", "--raw", "--draft", "self"],
        ["chat", STORIES, "--draft", "self"],
        ["plan", STORIES, "--whole-stack"],
        ["bench", STORIES, "--whole-stack"],
    ],
)
def test_options_of_a_stack_are_refused_for_what_is_none(
    words: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*map(str, words)]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert f"headrace: {STORIES}: is no stack of blocks" in said.err


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"Once upon a time\n" * 9 + b"there\0was", "it has a zero byte, at offset 158"),
        ("Größe".encode("latin1"), "it has the byte 0xf6, no UTF-8, at offset 2"),
        (b"\xff\xfeO\0n\0", "it has the byte 0xff, no UTF-8, at offset 0"),
        ("Größe".encode()[:-1] + b"\xc3", "it has the byte 0xc3, no UTF-8, at offset 6"),
    ],
)
def test_what_is_no_text_is_refused(
    data: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, written = tmp_path / "text.txt", tmp_path / "m.gguf"
    text.write_bytes(data)
    for words in (
        ["perplexity", STORIES, text],
        ["compare", STORIES, STORIES, text],
        ["trace", STORIES, text, "-o", written],
        ["compress", STORIES, written, "--format", "q4_0", "--calibrate", text],
        ["compress", STORIES, written, "--format", "q4_0", "--evaluate", text],
    ):
        assert cli.main([*map(str, words)]) == 2
        assert f"headrace: {text} is no text: {said}; name a text file" in capsys.readouterr().err
    assert not written.exists()


def test_no_model_that_loads_whole_guesses_for_itself() -> None:
    with (
        headrace.load(STORIES, context=64) as model,
        pytest.raises(ValueError, match="'self' is for a stack"),
    ):
        model.generate("Once", raw=True, draft="self")


def test_a_long_prompt_gets_its_context(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "There was a dog. "  # five tokens
    short = ran(capsys, smollm2_path, line, "-n", "4", "--memory", "180MB")
    assert short["context"] < 1024
    long = ran(capsys, smollm2_path, line * 220, "-n", "4", "--memory", "180MB")
    assert long["prompt_tokens"] + 4 <= long["context"]
    assert long["prompt_tokens"] > short["context"]
