"""What `headrace compress` says: what it refuses and why, what came out, and what to do with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hf_directory as hf
import pytest

from headrace import cli
from headrace.compress import compress
from headrace.errors import UnsupportedError
from headrace.loaders.progress import Progress
from headrace.sizes import compared_size

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs `headrace compress`: its exit code and what it says, less the folder's name."""

    def run(*words: object) -> tuple[int, str]:
        code = cli.main(["compress", *map(str, words)])
        return code, capsys.readouterr().err.replace(str(tmp_path), "DIR")

    return run


def test_a_stack_needs_a_text(tmp_path: Path, said: Said) -> None:
    code, line = said(STORIES, tmp_path / "s.gguf", "--format", "bitstack")
    assert code == 2 and line.count("\n") == 1
    assert "--format bitstack needs a text" in line
    assert "--calibrate TEXT" in line and "--method rtn" in line
    assert not list(tmp_path.iterdir())
    code, lines = said(STORIES, tmp_path / "s.gguf", "--format", "bitstack", "--method", "rtn")
    assert code == 0 and (tmp_path / "s.gguf").exists()
    assert "DIR/s.gguf: larger than the source: 2.35 MB against 1.05 MB, all blocks" in lines


def test_sizes_beside_the_source() -> None:
    assert compared_size(10**6, 2 * 10**6) == "1.00 MB (from 2.00 MB)"
    assert compared_size(10**6, 10**6) == "1.00 MB (from 1.00 MB)"
    assert compared_size(3 * 10**6, 10**6) == "larger than the source: 3.00 MB against 1.00 MB"
    exact = "larger than the source: 1,000,001 bytes against 1,000,000"
    assert compared_size(10**6 + 1, 10**6) == exact


def test_the_hint_is_what_the_model_can_do(tmp_path: Path, said: Said, smollm2_path: Path) -> None:
    _, lines = said(STORIES, tmp_path / "a.gguf", "--format", "q4_0")
    assert "DIR/a.gguf: " in lines and " (from 1.05 MB)\n" in lines
    assert lines.endswith('DIR/a.gguf --raw "Once upon a time"` (it has no chat template)\n')
    _, lines = said(smollm2_path, tmp_path / "b.gguf")
    assert lines.endswith('try `headrace run DIR/b.gguf "Why is the sky blue?"`\n')
    _, lines = said(bare(tmp_path), tmp_path / "c.gguf")
    assert "no tokenizer" in lines and "`headrace bench DIR/c.gguf`" in lines
    assert "headrace run" not in lines


def bare(tmp_path: Path) -> Path:
    """A directory with a model that has no tokenizer."""
    folder = hf.family_directory(tmp_path / "bare", "llama2")
    (folder / "tokenizer.json").unlink()
    return folder


def test_a_directory_without_a_tokenizer_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bare(tmp_path)
    for words in (["run", folder, "hi"], ["run", folder, "hi", "--raw"]):
        assert cli.main([*map(str, words)]) == 2
        line = capsys.readouterr().err
        assert f"headrace: {folder}: this directory has no tokenizer.json" in line
        assert "tokenizer.ggml" not in line and "beside the weights" in line


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("q40", "q4_0"),
        ("Q4_0", "q4_0"),
        ("q4", "q4_0 or q4_1 or q4_k"),
        ("q4_k_m", "q4_k"),
        ("bitsack", "bitstack"),
        ("int4", "i4_g32 or i4_auto"),
        ("FP4", "mxfp4 or nvfp4"),
        ("ternary", "tq2_0 or tq1_0"),
    ],
)
def test_a_format_that_was_nearly_named(name: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as refused:
        compress(STORIES, tmp_path / "m.gguf", format=name)
    asked = f"there is no format {name!r} (did you mean {near}?); --format takes: keep, bitstack"
    assert asked in str(refused.value)


@pytest.mark.parametrize("name", ["", "awq"])
def test_a_format_that_is_like_no_other(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"there is no format '{name}'; --format takes"):
        compress(STORIES, tmp_path / "m.gguf", format=name)


def test_so_little_is_left(tmp_path: Path) -> None:
    told: list[str] = []
    done = compress(
        STORIES, tmp_path / "a.gguf", format="gqs_g16", sparsity=0.99, notice=told.append
    )
    assert "--sparsity 0.99 leaves out more than half" in told[0] == done.remarks[0]
    fewer = compress(STORIES, tmp_path / "b.gguf", format="gqs_g16", sparsity=0.5)
    assert not any("leaves out" in line for line in fewer.remarks)


def test_an_interrupted_command_says_what_is_kept(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def stopping() -> Iterator[Progress]:
        def report(done: int, total: int | None, what: str) -> None:
            if what == "writing" and total is not None and done > total // 2:
                raise KeyboardInterrupt

        yield report

    with monkeypatch.context() as patch:
        patch.setattr("headrace.cli_compress.progress_bar", stopping)
        code, lines = said(STORIES, tmp_path / "m.gguf", "--format", "q8_0")
    assert code == 130
    kept = "what is complete of DIR/m.gguf is kept: the same command goes on\ninterrupted\n"
    assert lines.endswith(kept)
    code, lines = said(STORIES, tmp_path / "m.gguf", "--format", "q8_0")
    assert code == 0 and "resuming what was interrupted: going on after " in lines
    assert "tensors, which are in DIR/.m.gguf-" in lines
