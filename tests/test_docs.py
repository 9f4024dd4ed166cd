"""What the documents say, compared with the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli import COMMANDS, DEFAULT_MODEL
from headrace.families import names
from headrace.sparse.registry import FORMATS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGE = ("runtime", "loaders", "sparse", "offload", "targets")
BENCHMARKS = sorted((ROOT / "examples" / "benchmarks").glob("*.py"))
# Where packages and models come from is the user's configuration, not ours to name.
HOSTS = ("pypi.org", "pythonhosted.org", "huggingface.co", "hf.co", "anaconda.org", "debian.org",
         "npmjs", "crates.io", "proxy.golang.org", "docker.io", "ghcr.io")  # fmt: skip
_FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def texts() -> list[Path]:
    """Everything that people read: documents and examples."""
    return [*DOCUMENTS, *sorted((ROOT / "examples").rglob("*.py"))]


def commands(text: str) -> list[list[str]]:
    """Command lines in code, as words: those of headrace and of the benchmark scripts."""
    text = text.replace("\\\n", " ")
    spans = re.findall(r"`([^`\n]+)`", text)
    blocks = re.findall(
        r"^(?: {4}|\$ )?((?:HEADRACE|headrace|python|PYTHON).*)$", text, re.MULTILINE
    )
    found = []
    for line in [*spans, *blocks]:
        words = shlex.split(line.removeprefix("$ "), comments=True) if balanced(line) else []
        while words and re.match(r"HEADRACE_\w+=", words[0]):
            words.pop(0)
        if words and (words[0] == "headrace" or words[:1] == ["python"]):
            found.append(words)
    return found


def balanced(line: str) -> bool:
    """Whether a line can be split into words."""
    return line.count('"') % 2 == 0 and line.count("'") % 2 == 0


def flags_of(command: str) -> set[str]:
    """The flags that a command takes."""
    return {"--help", *(flag for option in COMMANDS[command].options for flag in option.flags)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_and_flags_exist(path: Path) -> None:
    for words in commands(path.read_text("utf-8")):
        flags = {word.partition("=")[0] for word in words if _FLAG.match(word)}
        if words[0] == "headrace" and len(words) > 1:
            if words[1] == "--version" or not re.fullmatch(r"[a-z]+", words[1]):
                continue
            command = " ".join(words[1:3] if words[1] in GROUPS else words[1:2])
            assert command in COMMANDS, shlex.join(words)
            assert flags <= flags_of(command), shlex.join(words)
        elif len(words) > 1 and words[1].endswith(".py"):
            script = (ROOT / words[1]).read_text("utf-8")
            assert all(f'"{flag}"' in script for flag in flags), shlex.join(words)


def test_readme_shows_every_command() -> None:
    for command in COMMANDS:
        assert re.search(rf"`headrace {command}[ `]", README), command
    assert DEFAULT_MODEL in README


def test_flags_beside_commands_exist() -> None:
    section = README.partition("## Commands")[2].partition("\n## ")[0]
    known = set().union(*map(flags_of, COMMANDS))
    for words, text in re.findall(r"^\| `headrace ([^`]*)` \|(.*)\|$", section, re.MULTILINE):
        first, second, *_ = [*words.split(), ""]
        own = flags_of(f"{first} {second}" if first in GROUPS else first)
        mentioned = set(_FLAG.findall(" ".join(re.findall("`([^`]*)`", text))))
        assert mentioned <= (known if first in GROUPS else own)
        assert set(_FLAG.findall(words)) <= own
    spans = " ".join(re.findall(r"`([^`]+)`", section.partition("MODEL is")[2]))
    assert set(_FLAG.findall(spans)) <= known


def test_environment_variables_are_all_in_the_table() -> None:
    used = set()
    for folder in PACKAGE:
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"HEADRACE_[A-Z_]+", path.read_text("utf-8")))
    table = README.partition("## Environment variables")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(HEADRACE_[A-Z_]+)` \|", table, re.MULTILINE)) == used
    for path in DOCUMENTS:
        assert set(re.findall(r"HEADRACE_[A-Z_]+", path.read_text("utf-8"))) <= used, path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_relative_links_resolve(path: Path) -> None:
    for target in _LINK.findall(path.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_that_documents_name_exist(path: Path) -> None:
    folders = "|".join((*PACKAGE, "tests", "examples", "docs"))
    for name in re.findall(rf"`((?:{folders})/[\w./]*\w\.(?:py|md))`", path.read_text("utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", texts(), ids=lambda p: p.name)
def test_no_registry_is_named(path: Path) -> None:
    text = path.read_text("utf-8").lower()
    assert [host for host in HOSTS if host in text] == []


def test_readme_names_formats_and_families() -> None:
    for fmt in FORMATS.values():
        name = fmt.ggml_type or fmt.name
        assert re.search(rf"\b{name}\b", README), name
    for family in names():
        assert f"`{family}`" in README, family


def test_operators_of_networks_are_in_their_table() -> None:
    """Those with kernels of ours, and those that patterns find in the file."""
    from headrace.networks import operator_table
    from headrace.networks.operators import OPERATORS
    from headrace.networks.patterns import microsoft

    text = (ROOT / "docs" / "onnx.md").read_text("utf-8")
    table = text.partition(operator_table.BEGIN)[2].partition(operator_table.END)[0]
    written = "python -m headrace.networks.operator_table docs/onnx.md"
    assert table == operator_table.operator_table(), f"write it: {written}"
    of_files = [name for name in OPERATORS if not name.startswith("headrace.")]
    more = [*microsoft._MAKERS, "DynamicQuantizeMatMul", "MatMulIntegerToFloat"]
    operators = "\n".join(row.split(" | ")[0] for row in table.splitlines())
    for name in (*of_files, *more):
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", operators), name


def test_blocks_that_scripts_fill_are_marked() -> None:
    assert README.count("<!-- benchmark -->") == README.count("<!-- /benchmark -->") == 1
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        assert text.count("<!-- measured -->") == text.count("<!-- /measured -->"), path.name


def test_the_python_of_the_readme_runs(smollm2_path: Path, tmp_path: Path) -> None:
    code = README.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ended by" in done.stdout
