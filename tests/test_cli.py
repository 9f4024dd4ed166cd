"""The command line, with a stand-in for the model: parsing, output, errors, start-up."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import __version__, cli, cli_options, cli_output
from headrace.errors import ContextOverflowError, ModelFileError, TemplateError


def app() -> Any:
    """The typer application of the command."""
    return cli_options.build_app(cli.COMMANDS, cli._guarded, cli._print_version)


class Generation:
    def __init__(self, pieces: list[Any], lookup: bool | None) -> None:
        self.pieces = pieces
        self.stats = types.SimpleNamespace(
            prompt_tokens=5, new_tokens=3, prefill_s=0.1, decode_s=0.02, finish_reason="length",
            passes=1, accepted_tokens=1, tokens_per_pass=2.0,
        )  # fmt: skip
        self.lookup = lookup

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


class Model:
    """Records what it is called with."""

    def __init__(self) -> None:
        self.pieces: list[Any] = ["Rayleigh ", "scat", "tering"]
        self.calls: list[tuple[Any, ...]] = []
        self.notices: list[str] = []
        self.plan = types.SimpleNamespace(
            notices=lambda: self.notices, budget=10**9, context=256, wanted_context=256,
            resident_weights=5, flash_bytes_per_token=7,
        )  # fmt: skip

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append(("close",))

    def generate(self, prompt: str, **options: Any) -> Generation:
        self.calls.append(("generate", prompt, options))
        return Generation(self.pieces, options["lookup"])

    def chat(self, system: str | None = None) -> Model:
        self.calls.append(("chat", *([system] if system else [])))
        return self

    def send(self, text: str, **options: Any) -> Generation:
        self.calls.append(("send", text, options))
        return Generation(self.pieces, options["lookup"])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    stand_in = Model()

    def load(name: str, **options: Any) -> Model:
        assert callable(options.pop("progress"))
        stand_in.calls.append(("load", name, options))
        return stand_in

    module = types.ModuleType("headrace.model")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "headrace.model", module)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    return stand_in


def stdin(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_run_prints_the_text_and_then_the_figures(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    model.notices.append("the context is 256 tokens")
    assert cli.main(["run", "m.gguf", "why?", "-n", "3", "--threads=2"]) == 0
    out, err = capsys.readouterr()
    assert out == "Rayleigh scattering\n"
    assert err.startswith("the context is 256 tokens\n3 tokens · 100 tok/s · first token ")
    assert err.strip().endswith("B")
    (_, name, options), (_, prompt, sampling), _ = model.calls
    assert (name, options, prompt) == ("m.gguf", {"threads": 2}, "why?")
    assert sampling["max_tokens"] == 3
    assert sampling["raw"] is False
    assert sampling["stop"] == ()
    assert sampling["lookup"] is None


def test_run_with_lookup(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "m.gguf", "why?", "--lookup"]) == 0
    assert "100 tok/s · 2.0 tokens per pass · first token" in capsys.readouterr().err
    assert cli.main(["run", "m.gguf", "why?", "--no-lookup"]) == 0
    assert "per pass" not in capsys.readouterr().err
    assert [call[2]["lookup"] for call in model.calls if call[0] == "generate"] == [True, False]


def test_run_json(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "m.gguf", "why?", "--json", "--stop", "a", "--stop", "b"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["text"] == "Rayleigh scattering"
    assert result["decode_tok_s"] == pytest.approx(100)
    assert result["peak_rss_bytes"] > 1_000_000
    assert (result["passes"], result["accepted_tokens"]) == (1, 1)
    assert (result["budget_bytes"], result["context"]) == (10**9, 256)
    assert (result["resident_weights_bytes"], result["bytes_read_per_token"]) == (5, 7)
    assert (result["tokens_per_pass"], result["notices"]) == (2.0, [])
    assert err == ""
    assert model.calls[1][2]["stop"] == ("a", "b")


def test_the_default_model(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["run", "Why is the sky blue?"]) == 0
    assert model.calls[0][1] == "smollm2-135m"
    assert model.calls[1][1] == "Why is the sky blue?"
    stdin(monkeypatch, "Größe\n".encode())
    assert cli.main(["run"]) == 0
    assert model.calls[4][1] == "Größe\n"


def test_the_prompt_from_stdin(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"a \xff b")
    assert cli.main(["run", "m.gguf", "-"]) == 0
    assert model.calls[1][1] == "a � b"


def test_no_prompt_on_a_terminal(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "m"]) == 2
    assert "there is no prompt; write `headrace run m " in capsys.readouterr().err
    assert cli.main(["run", "no-such.gguf"]) == 2
    assert "no file or directory no-such.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_stream_may_be_closed(model: Model, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.setattr(sys, stream, None)
    assert cli.main(["run", "m.gguf", "why?"]) == 0
    if stream == "stdin":
        assert cli.main(["run", "m.gguf", "-"]) == 2
        assert cli.main(["chat", "m.gguf"]) == 2


def test_ctrl_c_keeps_what_was_generated(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    model.pieces = ["Ray", KeyboardInterrupt()]
    assert cli.main(["run", "m.gguf", "why?"]) == 130
    out, err = capsys.readouterr()
    assert out == "Ray\n"
    assert err.startswith("interrupted · 3 tokens")
    assert model.calls[-1] == ("close",)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelFileError("bad magic", path="m.gguf"), 2, "headrace: m.gguf: bad magic\n"),
        (TemplateError("none"), 2, "headrace: none (`run --raw` needs no chat template)\n"),
        (ValueError("max_tokens must be at least 1"), 2, "headrace: max_tokens must be"),
        (ZeroDivisionError("x"), 1, "unexpected ZeroDivisionError: x (HEADRACE_DEBUG=1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "plan", cli.COMMANDS["plan"]._replace(function=fail))
    monkeypatch.delenv("HEADRACE_DEBUG", raising=False)
    assert cli.main(["plan", "m.gguf"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    if code in (1, 2):
        monkeypatch.setenv("HEADRACE_DEBUG", "1")
        assert cli.main(["plan", "m.gguf"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_while_modules_load_is_one_line() -> None:
    # As Python delivers it: from within an import.
    code = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "headrace.cli_commands":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from headrace.__main__ import main
sys.exit(main())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "interrupted\n")


def test_chat(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, b"hello\n\n/reset\nagain\n/exit\nnever\n")
    assert cli.main(["chat", "m.gguf"]) == 0
    names = [call[0] for call in model.calls]
    assert names == ["load", "chat", "send", "chat", "send", "close"]
    assert capsys.readouterr().out == "Rayleigh scattering\n" * 2


def test_chat_takes_bytes_that_are_no_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"a \xff b\n")
    assert cli.main(["chat", "m.gguf", "--system", "You are a mill."]) == 0
    assert model.calls[1] == ("chat", "You are a mill.")
    assert model.calls[2][1] == "a \ufffd b"


def test_a_chat_goes_on_after_an_error(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = iter(["too long", "again", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(words))
    pieces, model.pieces = model.pieces, [ContextOverflowError("it does not fit")]
    sent = model.send

    def send(text: str, **options: Any) -> Generation:
        generation = sent(text, **options)
        model.pieces = pieces
        return generation

    monkeypatch.setattr(model, "send", send)
    assert cli.main(["chat", "m.gguf"]) == 0
    out, err = capsys.readouterr()
    assert out == "Rayleigh scattering\n"
    first, figures = err.splitlines()
    assert first == "headrace: it does not fit (/reset begins a new conversation)"
    assert figures == "3 tokens · 100 tok/s"


def test_the_quick_parser_and_typer_agree(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        ["run", "m.gguf", "hi", "-n", "7", "--memory", "300MB", "--seed=1", "--raw"],
        ["run", "m.gguf", "hi", "--stop", "x", "--stop", "y", "--top-p", "0.5"],
        ["run", "--temperature", "0.5", "m.gguf", "-"],
        ["chat"],
        ["chat", "m.gguf", "--lookup"],
        ["run", "m.gguf", "hi", "--no-lookup"],
        ["bench", "m.gguf", "-p", "64", "--runs", "1", "--json"],
        ["plan", "m.gguf", "--memory=1.5GiB", "--context", "99"],
        ["perplexity", "m.gguf", "t.txt", "--context", "128"],
        ["compare", "a.gguf", "b.gguf", "t.txt", "--chunks", "2", "--memory", "1GB"],
        ["pull", "org/repo", "x.gguf"],
    ]
    seen: list[dict[str, Any]] = []
    for name, command in list(cli.COMMANDS.items()):
        record = command._replace(function=lambda **values: seen.append(values) or 0)
        monkeypatch.setitem(cli.COMMANDS, name, record)
    for line in lines:
        quick = cli_options.parse(cli.COMMANDS[line[0]], line[1:])
        assert quick is not None, line
        assert cli._typer_main(line) == 0
        slow = seen.pop()
        for name in {"stop", "inputs"} & set(slow):
            slow[name] = tuple(slow[name] or ())
        assert slow == quick, line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["plan"], "Missing argument"),
        (["run", "m", "p", "extra"], "unexpected extra argument"),
        (["run", "--nonsense"], "No such option"),
        (["run", "m", "p", "-n", "many"], "Invalid value for '-n'"),
        (["run", "m", "p", "--memory", "5XB"], "unknown unit"),
        (["run", "m", "p", "-n"], "requires an argument"),
        (["bogus"], "No such command"),
    ],
)
def test_wrong_usage(line: list[str], message: str) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app(), line)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert cli.main(line) == 2


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help(command: str) -> None:
    from typer.testing import CliRunner

    line = [*command.split(), "--help"]
    result = CliRunner().invoke(app(), line, env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    if command:
        for option in cli.COMMANDS[command].options:
            assert all(flag in result.output for flag in option.flags)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"headrace {__version__}\n"
    assert cli._typer_main(["--version"]) == 0


def write_gguf(path: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("evil \x1b[31m name")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(100)])
    writer.add_tensor("a", np.zeros((4, 64), np.float32))
    writer.add_tensor("b", np.ones((1, 256), np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    assert cli.main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "llama"
    assert facts["parameters"] == 512
    assert facts["vocabulary"] == 100
    assert facts["metadata"]["tokenizer.ggml.tokens"]["count"] == 100
    rows = {row["type"]: row for row in facts["types"]}
    assert rows["F32"]["loads_as"] == "kernel"
    assert rows["F64"]["loads_as"] == "expanded to F32"
    assert rows["F64"]["bytes"] == 8 * 256
    assert rows["F64"]["loaded_bytes"] == 16 * 4 * 256  # rows fill a tile
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "expanded to F32" in out
    assert "[token0, token1, token2, token3, ...] (100)" in out
    assert "\x1b" not in out


def test_inspect_of_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<!DOCTYPE html>" * 10)
    assert cli.main(["inspect", str(tmp_path / "x.gguf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_pull(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(name: str, **options: Any) -> Path:
        options["progress"](1, 2, "Downloading")
        return Path(f"/cache/{name}/{options['file']}")

    monkeypatch.setattr("headrace.loaders.pull.pull", fetch)
    assert cli.main(["pull", "org/repo", "x.gguf"]) == 0
    assert capsys.readouterr() == ("/cache/org/repo/x.gguf\n", "")


def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(cli_output, "_BAR_AFTER_S", 0.0)
    with cli_output.progress_bar() as report:
        report(50_000_000, 100_000_000, "Downloading [red]x")
    assert "50.0 MB/100 MB" in terminal.getvalue()


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "import sys; from headrace import cli\n"
        "def many(**_):\n"
        "    for i in range(100000): print('x' * 100)\n"
        "    return 0\n"
        "cli.COMMANDS['plan'] = cli.COMMANDS['plan']._replace(function=many)\n"
        "sys.exit(cli.main(['plan', 'm']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_a_parsed_command_line_imports_little() -> None:
    code = (
        "import sys; from headrace import cli, cli_options\n"
        "cli_options.parse(cli.COMMANDS['run'], ['m', 'hi', '--memory', '1MB'])\n"
        "print(*(sys.modules.keys() & {'typer', 'rich', 'click', 'numpy', 'inspect', 'jinja2'}))"
    )
    start_up = subprocess.check_output(
        [sys.executable, "-c", "import sys; print(*(sys.modules.keys() & {'inspect'}))"]
    )
    assert set(subprocess.check_output([sys.executable, "-c", code]).split()) == set(
        start_up.split()
    )
