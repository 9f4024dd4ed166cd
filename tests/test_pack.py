"""Kernel packs: built, loaded without a compiler, and refused when they do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_families import PATHS

import headrace
from headrace.errors import KernelError
from headrace.kernels.table import kernel_table
from headrace.targets import features, sve_length
from headrace.targets.host import pick_target, runnable_targets
from headrace.targets.manifest import LAYOUT, MANIFEST
from headrace.targets.naming import choose
from headrace.targets.pack import Pack, PackedKernels, build
from headrace.targets.target import all_targets

STORIES = Path(__file__).parent / "data" / "stories260K.gguf"
BEST = pick_target(None)


@pytest.fixture
def changed(pack: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(pack, tmp_path / "pack")


WITHOUT_A_COMPILER = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("numba", "llvmlite"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
import headrace
with headrace.load(sys.argv[1], kernels=sys.argv[2], threads=2) as model:
    answer = model.generate("Once upon a time", raw=True, max_tokens=30)
    answer.text()
    print(*answer.ids)
"""


def test_a_pack_needs_no_compiler(pack: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_A_COMPILER, str(STORIES), str(pack)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    with headrace.load(STORIES) as model:
        answer = model.generate("Once upon a time", raw=True, max_tokens=30)
        answer.text()
    assert [int(word) for word in done.stdout.split()] == answer.ids


def test_a_pack_that_the_installation_brought_is_used(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pack, tmp_path / "packs" / BEST.architecture)
    monkeypatch.setattr("headrace.targets.pack.SHIPPED", tmp_path / "packs")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "empty"))
    with headrace.load(STORIES) as model:
        assert isinstance(model.kernel_store, PackedKernels)
        model.logits([1])
    assert not (tmp_path / "empty" / "kernels").exists()
    monkeypatch.undo()
    monkeypatch.setattr("headrace.targets.pack.SHIPPED", tmp_path / "packs")
    with headrace.load(PATHS["gemma3"]) as model:  # has kernels that the pack has not
        assert not isinstance(model.kernel_store, PackedKernels)


NO_COMPILER = (
    WITHOUT_A_COMPILER.partition("import headrace")[0]
    + """
import headrace
from headrace.errors import KernelError
try:
    headrace.load(sys.argv[1])
except KernelError as error:
    print(error)
"""
)


def test_without_compiler_and_pack_it_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_COMPILER, str(STORIES)]
    environment = os.environ | {"HEADRACE_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert "`pip install numba llvmlite`, or give a kernel pack" in done.stdout


def test_the_same_sources_give_the_same_pack(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "empty"))  # all compiled anew
    names = Pack(pack).levels[BEST.name].kernels
    again = build([BEST], [kernel_table()[name] for name in names], tmp_path / "again", n_workers=2)
    for path in pack.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_a_model_that_the_pack_has_no_kernels_for(pack: Path) -> None:
    with pytest.raises(KernelError, match=r"has no .* of this release .* build it again"):
        headrace.load(PATHS["gemma3"], kernels=pack)


def test_no_level_for_this_cpu(pack: Path) -> None:
    with pytest.raises(
        KernelError, match=f"pack {pack}: unknown target 'x'; targets: {BEST.name}$"
    ):
        headrace.load(STORIES, kernels=pack, target="x")


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the manifest."""

    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return spoil


def level(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["targets"][BEST.name]
    return found


def flip(folder: Path) -> None:
    path = next(folder.glob("*.so"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


NONE = "is no manifest of a kernel pack: "
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another layout": (edit(lambda m: m.update(layout=LAYOUT + 1)), "layout is 2, this release's"),
    "no layout": (edit(lambda m: m.pop("layout")), "layout is not said, this release's 1"),
    "no targets": (edit(lambda m: m.update(targets=[1])), NONE + 'it lacks "targets"'),
    "no level": (edit(lambda m: m["targets"].update({BEST.name: 1})), NONE + '"file" of'),
    "no hash": (edit(lambda m: level(m).pop("sha256")), NONE + '"sha256" of .* is no text'),
    "a path": (edit(lambda m: level(m).update(file="../x.so")), "no name of a library"),
    "a parent": (edit(lambda m: level(m).update(file="..")), "no name of a library"),
    "kernels": (edit(lambda m: level(m).update(kernels=[["a"]])), "are no keys by name"),
    "keys": (edit(lambda m: level(m)["kernels"].update(team_lead="0")), "has no team_lead of this"),
    "a system": (edit(lambda m: level(m).update(triple="vax-dec-vms")), "is for vax-dec-vms, and"),
    "a bit": (flip, "is not the library that the pack's manifest describes"),
    "no library": (lambda f: next(f.glob("*.so")).unlink(), "cannot be loaded .No such file"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "is no kernel pack"),
    "text": (lambda f: (f / MANIFEST).write_text("<html>"), NONE + "it is not JSON"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), NONE + 'it lacks "targets"'),
    "deep": (lambda f: (f / MANIFEST).write_text("[" * 100_000), NONE + "it is not JSON"),
    "bytes": (lambda f: (f / MANIFEST).write_bytes(b"\xff" * 9), NONE + "it is not JSON"),
    "large": (lambda f: (f / MANIFEST).write_bytes(bytes(2 << 20)), "it is too large"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_pack_that_is_not_what_it_says_is_refused(what: str, changed: Path) -> None:
    spoil, says = SPOILT[what]
    spoil(changed)
    with pytest.raises(KernelError, match=says) as raised:
        headrace.load(STORIES, kernels=changed)
    assert "Error(" not in str(raised.value)  # nor how Python shows one


def test_a_pack_of_another_architecture_is_named(changed: Path) -> None:
    edit(lambda m: m.update(targets={"wasm32": level(m)}))(changed)
    with pytest.raises(KernelError, match=rf"pack {changed}: no kernels for this CPU .* wasm32$"):
        headrace.load(STORIES, kernels=changed)


def test_a_new_pack_replaces_the_old_one_and_nothing_else(changed: Path) -> None:
    others = {"notes.txt", "headrace-mine.so"}
    for name in others:
        (changed / name).write_text("mine")
    # A manifest that names more than it may: only libraries of packs are removed.
    strange = {"vax": {"file": "notes.txt"}, "pdp": {"file": "../notes.txt"}, "odd": 3}
    edit(lambda m: m["targets"].update(strange))(changed)
    target = all_targets()["aarch64-neon" if BEST.name != "aarch64-neon" else "riscv64"]
    build([target], [kernel_table()["copy_f32"]], changed)
    left = {path.name for path in changed.iterdir()}
    assert left == {MANIFEST, f"headrace-{target.name}.so", *others}
    assert list(Pack(changed).levels) == [target.name]


def test_a_pack_needs_a_folder() -> None:
    with pytest.raises(KernelError, match="a kernel pack needs a folder"):
        build([BEST], [], "")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", STORIES):
        with pytest.raises(KernelError, match="is no kernel pack"):
            Pack(path)


def test_what_to_build() -> None:
    every = all_targets().values()
    levels = [target.name for target in choose(every, "aarch64-linux", None)]
    assert levels[:2] == ["aarch64-neon", "aarch64-dotprod"]
    assert [t.name for t in choose(every, "aarch64", "cortex-a76")] == levels[:2]
    assert [t.name for t in choose(every, "x86-64-v3", None)] == ["x86-64-v3"]
    with pytest.raises(KernelError, match=r"unknown target 'vax'; architectures: aarch64, "):
        choose(every, "vax", None)
    for what in ("arm64-linux", "AArch64-Linux"):
        assert [target.name for target in choose(every, what, None)] == levels
    assert [target.name for target in choose(every, "armv7-linux", None)] == ["armv7-neon"]
    with pytest.raises(KernelError, match="may stand -linux, -macos, -windows"):
        choose(every, "aarch64-android", None)


@pytest.mark.parametrize(
    ("bits", "name"),
    [(0, "aarch64-i8mm"), (128, "aarch64-i8mm"), (256, "aarch64-sve256"), (2048, "aarch64-sve512")],
)
def test_the_length_of_vectors_decides(bits: int, name: str) -> None:
    has = {"neon", "dotprod", "fullfp16", "i8mm", "sve", *sve_length.up_to(bits)}
    fitting = [t for t in all_targets().values() if t.architecture == "aarch64" and t.needs <= has]
    assert fitting[-1].name == name


def test_the_system_and_llvm_see_the_same_cpu() -> None:
    import llvmlite.binding as llvm

    wanted = frozenset().union(*(target.needs for target in runnable_targets()))
    wanted -= {f"sve{bits}" for bits in sve_length.LENGTHS}  # LLVM does not say how long they are
    seen = {name for name, on in llvm.get_host_cpu_features().items() if on}
    assert wanted & features.host_features() == wanted & seen
