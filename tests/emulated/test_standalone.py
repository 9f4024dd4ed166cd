"""Executables of whole models: on this CPU and on emulated ones, where they say the same tokens."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import FOREIGN, USUAL, param

import headrace
from headrace.compress import compress
from headrace.errors import BudgetError, ContextOverflowError, KernelError
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import open_model
from headrace.planning import prepare_for
from headrace.standalone.constants import constant_sizes, vocabulary_pieces, write_constants
from headrace.standalone.export import export
from headrace.standalone.places import ProgramPlaces, number_of, place_of
from headrace.targets.host import runnable_targets
from headrace.targets.target import Target, all_targets
from headrace.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data"
STORIES = DATA / "stories260K.gguf"
PROMPTS = json.loads((DATA / "golden_smollm2.json").read_text("utf-8"))["prompts"]
HERE = runnable_targets()[-1]
# Emulators take up to a second for a token, and longer for a prompt.
FEW, MANY = 2, 12
CI = (USUAL["aarch64"], USUAL["riscv64"])
LEAD = 0.2  # a smaller one may be turned by how a CPU rounds
N_TOKENS = 40


def run(
    program: Path, *arguments: str, machine: str = "", ok: bool = True
) -> subprocess.CompletedProcess[bytes]:
    # Nothing of this machine: no environment, no folder that it could read from.
    command = [*shlex.split(machine), str(program), *arguments]
    environment = {"PATH": os.environ["PATH"]} if machine else {}
    done = subprocess.run(command, capture_output=True, env=environment, cwd="/", timeout=600)
    if ok:
        assert (done.returncode, done.stderr) == (0, b"")
    return done


def ids_of(program: Path, prompt: list[int], n: int, machine: str = "") -> list[int]:
    listed = ",".join(map(str, prompt))
    out = run(program, "--ids", listed, "-n", str(n), "--print-ids", machine=machine).stdout
    assert out.endswith(b"\n")
    return [int(each) for each in out.split(b",")] if out.strip() else []


def clear_tokens(model: headrace.Model, prompt: list[int], n: int) -> list[int]:
    """The likeliest continuation on this CPU as far as each token leads by more than LEAD."""
    found: list[int] = []
    while len(found) < n:
        logits = model.logits([*prompt, *found], last=1)[0]
        second, first = np.sort(logits)[-2:]
        token = int(logits.argmax())
        if first - second <= LEAD or token in model.tokenizer.eos_ids:
            break
        found.append(token)
    return found


# --- this CPU -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standalone") / "stories"
    made = export(STORIES, HERE, path)
    assert made.file_bytes == path.stat().st_size
    return path


needs_here = pytest.mark.target(HERE.name, "")


@needs_here
@pytest.mark.parametrize("n_prompt", [1, 2, 16, 17, 90])  # each of the three modes, and chunks
def test_it_says_what_the_runtime_says(here: Path, n_prompt: int) -> None:
    with headrace.load(STORIES, threads=1) as model:
        text = (
            "Once upon a time, there was a little girl named Lily. She loved to play outside. " * 9
        )
        prompt = model.tokenize(text)[:n_prompt]
        generation = model.generate(prompt, max_tokens=N_TOKENS)
        expected = generation.text()
        assert ids_of(here, prompt, N_TOKENS) == generation.ids
        listed = ",".join(map(str, prompt))
        shown = run(here, "--ids", listed, "-n", str(N_TOKENS)).stdout
        assert shown.decode() == expected + "\n"


@needs_here
def test_it_ends_where_the_model_ends(here: Path) -> None:
    with headrace.load(STORIES, threads=1) as model:
        prompt = model.tokenize("The end")
        for n in range(0, 200, 40):
            generation = model.generate(prompt, max_tokens=n + 1)
            generation.text()
            kept = [token for token in generation.ids if token not in model.tokenizer.eos_ids]
            assert ids_of(here, prompt, n + 1) == kept


@needs_here
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), b"usage: --ids"),
        (("--ids",), b"--ids needs a value\nusage: --ids"),
        (("--ids", "1", "-n"), b"-n needs a value\nusage: --ids"),
        (("--ids=1,2",), b"--ids=1,2: no such option; a value follows its option after a space"),
        (("--ids", "1", "x"), b"x: no such option"),
        (("--ids", ""), b"--ids takes 1 to 511 ids from 0 to 511"),
        (("--ids", "1,"), b"--ids takes"),
        (("--ids", "1,-2"), b"--ids takes"),
        (("--ids", "512"), b"--ids takes"),
        (("--ids", "99999999999999999999999"), b"--ids takes"),
        (("--ids", ",".join(["1"] * 512)), b"--ids takes"),
        (("--ids", "1", "-n", "x"), b"-n takes"),
        (("--ids", "1", "-n", "1,2"), b"-n takes"),
        (("--ids", "1", "-n", "99999999999"), b"-n takes"),
        (("--ids", "1", "-n", "512"), b"do not fit in the context of 512"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments(here: Path, arguments: tuple[str, ...], says: bytes) -> None:
    done = run(here, *arguments, ok=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(says) or says in done.stderr


@needs_here
def test_help_is_no_failure(here: Path) -> None:
    assert run(here, "--ids", "1", "--help").stdout.startswith(b"usage: --ids ID,ID,... [-n TOK")


@needs_here
def test_no_tokens_and_the_whole_context(here: Path) -> None:
    assert ids_of(here, [1], 0) == []
    assert 0 < len(ids_of(here, [1], 511)) <= 511
    assert len(ids_of(here, [1] * 511, 1)) == 1


@needs_here
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_failure(here: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([str(here), "--ids", "1"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1


# --- what goes in ---------------------------------------------------------------------------------


def test_constants_are_what_the_runtime_has_in_memory(tmp_path: Path) -> None:
    file = open_model(STORIES)
    prepared = prepare_for(HERE, file, 64, threads=1)
    vocabulary = vocabulary_pieces(
        Tokenizer.from_metadata(file.metadata, STORIES), prepared.decoder.vocabulary
    )
    places = ProgramPlaces(constant_sizes(prepared, vocabulary), {}, "")
    path = tmp_path / "constants.bin"
    write_constants(path, prepared, vocabulary, places.constants, places.constant_bytes, None)
    data = path.read_bytes()
    assert len(data) == places.constant_bytes
    with headrace.load(STORIES, context=64, threads=1) as model:
        weights = model._held.weights
        arrays = {f"vector {name}": weights.vectors.view(name) for name in weights.vectors}
        for name, places_of in weights._kept.items():
            (place,) = places_of.values()
            arrays[f"matrix {name}"] = place.view
        for name, array in arrays.items():
            at = places.constants[name]
            assert data[at : at + array.nbytes] == array.tobytes(), name


def test_numbers_stand_for_places() -> None:
    places = ProgramPlaces({"matrix a": 100, "vector b": 3}, {"x": 10, "prefill.x": 20}, "a")
    assert place_of(places.vector("b")) == ("headrace_data", 128)
    assert place_of(places.buffer("x", True) + 8) == ("headrace_buffers", 64 + 8)
    assert place_of(places.buffer("x", False)) == ("headrace_buffers", 0)
    assert place_of(places.kv() + 5) == ("headrace_kv", 5)
    assert place_of((1 << 44) - 1) is None
    found = place_of(places.embedding())
    assert found is not None and number_of(found) == places.embedding()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="no executables for wasm32"):
        export(STORIES, all_targets()["wasm32"], tmp_path / "x")
    monkeypatch.setattr("headrace.standalone.export.ADDRESS_SPACE_32", 1 << 20)
    with pytest.raises(BudgetError, match=r"more than the 1\.05 MB of a program for armv7-neon"):
        export(STORIES, all_targets()["armv7-neon"], tmp_path / "x")
    with pytest.raises(ContextOverflowError, match="no room for a prompt and an answer: take 2"):
        export(STORIES, HERE, tmp_path / "x", context=1)
    with pytest.raises(KernelError, match="an executable needs a name"):
        export(STORIES, HERE, "")
    assert list(tmp_path.iterdir()) == []


@needs_here
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorReader, "readinto", fail)
    with pytest.raises(KeyboardInterrupt):
        export(STORIES, HERE, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# --- other CPUs -----------------------------------------------------------------------------------


@cache
def _smollm2(target: str, folder: Path, model: Path) -> Path:
    path = folder / target
    if not path.exists():
        export(model, FOREIGN[target], path, context=64, n_workers=os.cpu_count() or 1)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    with headrace.load(smollm2_path, context=64) as model:
        yield model


def machines() -> list[Any]:
    """Targets that executables are made for, on their weakest machine."""
    return [
        # A minute for each: CI hears AArch64 answer, of others it runs every kind of kernel.
        param(target, target.machines[0], slow=name != USUAL["aarch64"])
        for name, target in FOREIGN.items()
        if "-linux" in target.triple
    ]


def _agree(
    target: Target, machine: str, prompts: list[dict[str, Any]], n: int, folder: Path,
    model: Path, reference: headrace.Model,
) -> int:  # fmt: skip
    program = _smollm2(target.name, folder, model)
    compared = 0
    for prompt in prompts:
        expected = clear_tokens(reference, prompt["ids"], n)
        if expected:
            assert ids_of(program, prompt["ids"], len(expected), machine) == expected
        compared += len(expected)
    return compared


@pytest.mark.hang_s(600)
@pytest.mark.parametrize(("target_name", "machine"), machines())
def test_an_emulated_cpu_says_the_same_tokens(
    target_name: str, machine: str, folder: Path, smollm2_path: Path, reference: headrace.Model
) -> None:
    found = _agree(FOREIGN[target_name], machine, PROMPTS[:1], FEW, folder, smollm2_path, reference)
    assert found == FEW


@pytest.mark.slow
@pytest.mark.hang_s(1800)
@pytest.mark.parametrize(("target_name", "machine"), machines())
def test_on_all_prompts(
    target_name: str, machine: str, folder: Path, smollm2_path: Path, reference: headrace.Model
) -> None:
    found = _agree(FOREIGN[target_name], machine, PROMPTS, MANY, folder, smollm2_path, reference)
    assert found > 3 * MANY


@pytest.mark.parametrize(
    ("target_name", "machine"),
    [
        pytest.param(HERE.name, "", marks=needs_here),
        *(param(target, target.machines[0], slow=True) for target in FOREIGN.values()),
    ],
)
def test_group_sparse_models(target_name: str, machine: str, tmp_path: Path) -> None:
    path = compress(STORIES, tmp_path / "m.gguf", format="gqs_g16", sparsity=0, ends="f32").path
    target = HERE if target_name == HERE.name else FOREIGN[target_name]
    export(path, target, tmp_path / "program", context=64)
    with headrace.load(path, threads=1, context=64) as model:
        for text in ("Once", "Once upon a time there was a little girl who had a big red ball"):
            prompt = model.tokenize(text)
            expected = clear_tokens(model, prompt, FEW)
            assert ids_of(tmp_path / "program", prompt, len(expected), machine) == expected


# The newest CPUs of each architecture that lack something that a target needs.
TOO_OLD = [
    param(target, target.too_old[0], slow=name not in CI)
    for name, target in FOREIGN.items()
    if target.too_old and "-linux" in target.triple
]


@pytest.mark.parametrize(("target_name", "machine"), TOO_OLD)
def test_a_cpu_that_lacks_something_is_told(
    target_name: str, machine: str, folder: Path, smollm2_path: Path
) -> None:
    program = _smollm2(target_name, folder, smollm2_path)
    listed = ",".join(map(str, PROMPTS[0]["ids"]))
    done = run(program, "--ids", listed, machine=machine, ok=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"is for {target_name} (".encode() in done.stderr
    assert b"this CPU lacks some of it" in done.stderr


# --- what may not be overwritten ------------------------------------------------------------------


def test_neither_the_model_nor_a_device_is_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(STORIES.read_bytes())
    for output in (model, tmp_path, Path("/dev/zero")):
        if output.exists():
            with pytest.raises(FileExistsError):
                export(model, HERE, output)
    assert model.read_bytes() == STORIES.read_bytes()
    assert list(tmp_path.iterdir()) == [model]
