"""The package from a wheel, in an environment that has neither Numba nor llvmlite."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_families import PATHS
from wheels import COMPILER, build_wheel, copy_sources, needed

import headrace
from headrace.targets.host import machine

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
# The hub's client is there for `tokenizers` to fetch with, which is never asked to.
WITHOUT = (*COMPILER, "onnx", "onnxruntime", "huggingface-hub")

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with a wheel that has a pack for this CPU, and what it needs but a compiler.

    Skipped where nothing can be installed.
    """
    for module in ("build", "pip"):
        pytest.importorskip(module)
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"), [(machine(), pack)])
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pins = [f"{name}=={version}" for name, version in needed("headrace", WITHOUT).items()]
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "install", *options, wheel, *pins], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to install: {done.stderr}")
        pytest.skip(f"packages cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Run:
    """Run a program of the environment, with a cache that is empty at first."""

    def start(
        program: str, *arguments: object, ok: bool = True, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [environment / "bin" / program, *map(str, arguments)],
            input=text, capture_output=True, text=True, timeout=300, cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HEADRACE_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert (done.returncode == 0) == ok, done.stderr
        assert "unexpected" not in done.stderr
        return done

    return start


def test_make_wheel(tmp_path: Path) -> None:
    folder, venv = tmp_path / "sources", tmp_path / "venv"
    folder.mkdir()
    copy_sources(folder)
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".installed").touch()
    command = ["make", "wheel", f"VENV={venv}", "ARCHITECTURES="]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode and not os.environ.get("CI") and "setuptools" in done.stderr:
        pytest.skip("what builds wheels cannot be fetched")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"dist/headrace-{headrace.__version__}-py3-none-any.whl"


def answer() -> str:
    with headrace.load(STORIES) as model:
        return model.generate("Once upon a time", raw=True, max_tokens=30).text()


def test_the_compiler_is_not_there(run: Run) -> None:
    for module in COMPILER:
        assert "ModuleNotFoundError" in run("python", "-c", f"import {module}", ok=False).stderr


IMPORT_ALL = """
import importlib, json, pkgutil
import headrace
failed = {}
for module in pkgutil.walk_packages(headrace.__path__, "headrace."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = error.name
print(json.dumps(failed))
"""


def test_only_what_compiles_cannot_be_imported(run: Run) -> None:
    lacking = json.loads(run("python", "-c", IMPORT_ALL).stdout)
    packages = {name: module.partition(".")[0] for name, module in lacking.items()}
    failed = {name for name, package in packages.items() if package in COMPILER}
    assert {name.split(".")[1] for name in failed} <= {"targets", "standalone", "costs", "networks"}
    others = {name: package for name, package in packages.items() if name not in failed}
    assert {*others.values()} <= {"onnx", "onnxruntime"}
    of_networks = ("headrace.networks.", "headrace.loaders.onnx_")
    assert all(name.startswith(of_networks) for name in others)
    used = ("host", "features", "pack", "cache", "target", "emulation.machines", "emulation.wasm")
    assert not failed & {f"headrace.targets.{name}" for name in used}


def test_the_wheels_own_kernels_run_and_nothing_is_compiled(run: Run, tmp_path: Path) -> None:
    prompt = ("Once upon a time", "--raw", "-n", 30)
    assert run("headrace", "run", STORIES, *prompt).stdout.strip() == answer().strip()
    assert not (tmp_path / "cache" / "kernels").exists()


def test_a_pack_from_elsewhere_runs(run: Run, pack: Path, tmp_path: Path) -> None:
    away = shutil.copytree(pack, tmp_path / "pack")
    prompt = ("Once upon a time", "--raw", "-n", 30, "--kernels", away)
    assert run("headrace", "run", STORIES, *prompt).stdout.strip() == answer().strip()
    code = (
        "import headrace, sys\n"
        "with headrace.load(sys.argv[1], kernels=sys.argv[2]) as model:\n"
        "    print(model.generate('Once upon a time', raw=True, max_tokens=30).text())"
    )
    assert run("python", "-c", code, STORIES, away).stdout.strip() == answer().strip()


def test_what_needs_no_kernels_works(run: Run, tmp_path: Path) -> None:
    assert "llama" in run("headrace", "inspect", STORIES).stdout
    assert "predicted" in run("headrace", "plan", STORIES).stdout
    lacking = run("headrace", "plan", PATHS["gemma3"]).stdout  # has kernels that the pack has not
    assert "weights" in lacking and "predicted" not in lacking
    rows = json.loads(run("headrace", "targets", "list", "--json").stdout)
    (best,) = [row for row in rows if row["best_here"]]
    assert best["provable_on"] == ["this CPU"]
    lacking = {row["target"]: row["why_not"] for row in rows}
    assert "numba and llvmlite not installed" in lacking["wasm32"]
    tested = run("headrace", "targets", "test", "--kernel", "gemv_q4_0").stdout
    assert {line.split("  ")[3] for line in tested.splitlines()} == {"skipped"}
    assert "Usage" in run("headrace", "--help").stdout
    run("headrace", "compress", STORIES, tmp_path / "own.gguf")
    assert run("headrace", "run", tmp_path / "own.gguf", "Once", "--raw", "-n", 2).stdout


def test_what_needs_a_compiler_says_so(run: Run) -> None:
    for command in (
        ("targets", "build", "--target", "aarch64-linux", "-o", "out"),
        ("targets", "export", STORIES, "--target", "aarch64-linux", "-o", "out"),
        ("run", PATHS["gemma3"], "Once", "--raw"),
        ("run", STORIES, "Once", "--raw", "--target", "x86-64-v2"),
    ):
        said = run("headrace", *command, ok=False).stderr
        assert "`pip install numba llvmlite`" in said
        assert len(said.strip().splitlines()) == 1
