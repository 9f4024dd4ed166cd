"""The examples run as they stand, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_embed
from onnx import helper
from onnx_models import FLOAT, model_of, save
from PIL import Image

from headrace.kernels.table import kernel_table
from headrace.targets.emulation.machines import why_not
from headrace.targets.host import pick_target, runnable_targets
from headrace.targets.pack import Pack

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TINY = ROOT / "tests" / "data" / "stories260K.gguf"
HOST = pick_target(None)


def run(*command: object, text: str = "", ok: bool = True) -> subprocess.CompletedProcess[str]:
    """A script of the examples; its output, and whether it ended as wanted."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        input=text,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert (done.returncode == 0) == ok, done.stderr
    return done


def test_chat(smollm2_path: Path) -> None:
    out = run(EXAMPLES / "chat.py", smollm2_path, text="Say hello.\nAnd goodbye.\n").stdout
    first, *answers = out.splitlines()
    assert "Ctrl-D" in first
    assert len([line for line in answers if line.strip()]) >= 2


def test_in_a_thread(smollm2_path: Path) -> None:
    out = run(EXAMPLES / "in_a_thread.py", smollm2_path).stdout
    assert len(out.split()) > 5


@pytest.mark.slow
def test_cross_build(tmp_path: Path) -> None:
    if shutil.which("ld.lld") is None and not list(Path("/usr/bin").glob("ld.lld-*")):
        pytest.skip("ld.lld is not installed")
    out = run(EXAMPLES / "cross_build.py", HOST.name, tmp_path / "pack").stdout
    assert f"CPU levels: {HOST.name}\n" in out
    assert "manifest.json: " in out
    assert not Pack(tmp_path / "pack").lacking(kernel_table().values(), HOST)


def test_shell_scripts_are_well_formed() -> None:
    for script in EXAMPLES.glob("*.sh"):
        assert subprocess.run(["sh", "-n", script]).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="it makes executables for Linux")
def test_standalone(tmp_path: Path) -> None:
    path = tmp_path / "program"
    target = runnable_targets()[-1].name  # which has its kernels compiled
    options = ("--model", TINY, "--target", target, "--output", path)
    out = run(EXAMPLES / "standalone.py", *options, "Once upon").stdout
    assert out.splitlines()[0].startswith(f"{path}: ")
    assert "--ids 1," in out
    assert "Once upon a time" in out


def test_startup(tmp_path: Path) -> None:
    kept = tmp_path / "out.json"
    script = EXAMPLES / "benchmarks" / "startup.py"
    out = run(script, TINY, "--runs", 1, "--threads", 2, "--json", kept).stdout
    assert "| headrace |" in out
    found = json.loads(kept.read_text())
    assert found["sides"]["headrace"]["first_token_s"] > 0
    assert found["sides"]["headrace"]["peak_rss_bytes"] > 10e6
    parts = found["parts_s"]
    assert {"start of Python", "header and plan", "load kernels", "weights", "programs",
            "tokenizer", "prefill", "rest"} <= set(parts)  # fmt: skip
    assert min(parts.values()) > -1e-3


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """An "interpreter" that has measured already: half of ours would be a bold guess."""
    path = tmp_path / "python"
    answer = {"peer": "stand-in 1", "prefill_tok_s": 50.0, "decode_tok_s": 4.0}
    path.write_text(f"#!/bin/sh\necho noise\necho '{json.dumps(answer)}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.slow
def test_peers(peer: Path, tmp_path: Path) -> None:
    kept, readme = tmp_path / "out.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nafter\n")
    out = run(
        EXAMPLES / "benchmarks" / "peers.py", TINY, "--peer", f"other={peer}", "--rounds", 2,
        "--runs", 1, "-p", 32, "-n", 4, "--context", 64, "--threads", 2, "--patience", 0,
        "--against", TINY, "--json", kept, "--readme", readme,
    ).stdout  # fmt: skip
    head, rule, *rows = [line for line in out.splitlines() if line.startswith("|")]
    assert "other, tok/s" in head
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1
    assert [row.split("|")[2].strip() for row in rows] == [
        "prefill 32", "decode 4", "decode 4 after 64",
    ]  # fmt: skip
    found = json.loads(kept.read_text())
    prefill, decode, depth = found["rows"]
    assert prefill["best"]["other"] == 50.0
    assert depth["best"]["other"] == 4.0
    assert prefill["best"]["headrace"] == max(prefill["rates"]["headrace"])
    assert len(decode["rates"]["headrace"]) == len(decode["rates"]["other"]) == 2
    assert prefill["share"] is None
    assert decode["share"] > 0
    # In the second round the sides swap places.
    assert [one["side"] for one in found["said"]] == [
        *("headrace", "other") * 2, *("other", "headrace") * 2,
    ]  # fmt: skip
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmark -->\n|")
    assert text.endswith("<!-- /benchmark -->\nafter\n")
    assert "old" not in text
    assert str(tmp_path) not in text


def test_peers_says_what_failed() -> None:
    script = EXAMPLES / "benchmarks" / "peers.py"
    few = ("--rounds", 1, "--runs", 1, "-p", 8, "-n", 2, "--patience", 0)
    done = run(script, TINY, "--peer", "no=/bin/false", *few, ok=False)
    assert "/bin/false" in done.stderr


def test_benchmark_scripts_explain_themselves() -> None:
    for name in (
        "peers.py",
        "startup.py",
        "make_synthetic.py",
        "instructions.py",
        "products.py",
        "compression.py",
        "own_text.py",
    ):
        assert "usage" in run(EXAMPLES / "benchmarks" / name, "--help").stdout


def test_semantic_search(tmp_path: Path) -> None:
    encoder = test_embed.write(tmp_path / "encoder")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "one.txt").write_text("a b c d\n\n\nz y x\n")
    (tmp_path / "texts" / "deep" / "two.md").write_text("k l m")
    (tmp_path / "texts" / "other.bin").write_bytes(b"a b c d")
    out = run(EXAMPLES / "semantic_search.py", encoder, tmp_path / "texts", "z y x").stdout
    first, *others = out.splitlines()
    assert first.startswith("1.000  ") and first.endswith("one.txt: z y x")
    assert len(others) == 2
    (tmp_path / "nothing").mkdir()
    said = run(EXAMPLES / "semantic_search.py", encoder, tmp_path / "nothing", "x", ok=False).stderr
    assert "no paragraph" in said
    said = run(EXAMPLES / "semantic_search.py", encoder, tmp_path / "gone", "x", ok=False).stderr
    assert "there is no folder" in said and "Traceback" not in said
    assert "MODEL FOLDER QUERY" in run(EXAMPLES / "semantic_search.py", ok=False).stderr


def test_classify_image(tmp_path: Path) -> None:
    """Classes are the means of the colours red, green and blue."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["means"]),
        helper.make_node("Flatten", ["means"], ["scores"]),
    ]
    image = {"image": (FLOAT, ["batch", 3, 20, 30])}
    model = save(model_of(nodes, image, ["scores"]), tmp_path / "colours.onnx")
    labels = tmp_path / "labels.txt"
    labels.write_text("background\nred\ngreen\nblue\n")
    Image.new("RGB", (50, 40), (10, 200, 60)).save(tmp_path / "green.png")
    out = run(EXAMPLES / "classify_image.py", model, labels, tmp_path / "green.png", 0, 51).stdout
    found = [line.split() for line in out.splitlines()]
    shares = np.exp(np.array([200, 60, 10]) / 51)
    expected = [f"{share:.1%}" for share in shares / shares.sum()]
    assert found == [[s, n] for s, n in zip(expected, ("green", "blue", "red"), strict=True)]


def test_encoders_are_calibrated_and_scored(tmp_path: Path) -> None:
    encoder, scripts = test_embed.write(tmp_path / "encoder"), EXAMPLES / "benchmarks"
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n " * 9)
    out = tmp_path / "inputs"
    said = run(scripts / "encoder_inputs.py", encoder, text, out, "--tokens", 12, "--count", 5)
    assert said.stdout == "5 pieces of 12 tokens\n" and len(list(out.glob("*.npz"))) == 5
    with np.load(out / "0003.npz") as arrays:
        assert arrays["input_ids"].shape == (1, 12) and arrays["attention_mask"].all()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a b c,a b c,5\na b c,a b x,4\na b c,z y x,0\n")
    rows = run(scripts / "sentence_pairs.py", pairs, encoder).stdout.splitlines()
    assert len(rows) == 3 and -1 <= float(rows[2].split("|")[2]) <= 1
    said = run(scripts / "encoder_inputs.py", encoder, text, out, "--tokens", 999, ok=False)
    assert "a piece takes" in said.stderr


def test_learn_keywords() -> None:
    if reason := why_not("qemu-system-arm -M mps3-an547"):
        pytest.skip(reason)
    few = ["--epochs", "1", "--samples", "12", "--tests", "6"]
    first, *rates = run(EXAMPLES / "learn_keywords.py", *few).stdout.splitlines()
    assert "bytes of SRAM" in first
    before, after = (float(line.split(": ")[1].split("%")[0]) for line in rates)
    assert after > before + 20
