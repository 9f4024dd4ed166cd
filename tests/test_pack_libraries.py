"""Libraries of packs for every architecture and system: all kernels, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shared_libraries import symbols

from headrace.errors import KernelError
from headrace.kernels.table import kernel_table
from headrace.targets.linker import find_linker, linker_for
from headrace.targets.naming import choose
from headrace.targets.pack import Pack, build
from headrace.targets.systems import SYSTEMS, exists, for_system
from headrace.targets.table import symbol_of
from headrace.targets.target import all_targets

TABLE = kernel_table()
# CI builds these: between them they need all that LLVM calls by itself.
PART = ("attention_decode_d64", "gelu_f32", "team_lead")
QUICK = {
    "linux": ("aarch64-dotprod", "armv7-neon", "riscv64"),
    "macos": ("aarch64-dotprod",),
    "windows": ("x86-64-v3",),
}


def rows() -> list[Any]:
    found = []
    for system in SYSTEMS:
        for target in all_targets().values():
            if not exists(target, system):
                continue
            slow = [] if target.name in QUICK[system] else [pytest.mark.slow]
            found.append(pytest.param(target.name, system, False, marks=slow))
            found.append(pytest.param(target.name, system, True, marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("name", "system", "whole"), rows())
def test_a_library_shows_its_kernels_and_needs_nothing(
    name: str, system: str, whole: bool, tmp_path: Path
) -> None:
    target = for_system(all_targets()[name], system)
    try:
        find_linker(linker_for(target.triple))
    except KernelError as error:
        pytest.skip(str(error))
    names = tuple(TABLE) if whole else PART
    pack = build([target], [TABLE[one] for one in names], tmp_path, n_workers=2)
    assert Pack(pack).lacking([TABLE[one] for one in names], target) == []
    path = tmp_path / f"headrace-{name}{SYSTEMS[system].suffix}"
    shown, needed = symbols(path.read_bytes())
    assert shown == {symbol_of(one) for one in names}
    assert needed == set()


def test_systems_are_named_behind_the_target() -> None:
    every = all_targets().values()
    for what in ("aarch64-macos", "aarch64-dotprod-macos"):
        assert {t.triple for t in choose(every, what, None)} == {"aarch64-apple-macosx11.0.0"}
    assert len(choose(every, "riscv64-linux", None)) > len(choose(every, "riscv64", None)) == 1
    assert all(not target.guard for target in choose(every, "aarch64-windows", None))
    (windows,) = choose(every, "x86-64-v3-windows", None)
    assert windows.triple == "x86_64-pc-windows-msvc"
    for what in ("armv7a-macos", "riscv64-windows", "wasm32-linux"):
        with pytest.raises(KernelError, match="no shared libraries are built for"):
            choose(every, what, None)


def test_webassembly_has_no_packs(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no shared libraries are built for linux on wasm32"):
        build([all_targets()["wasm32"]], [], tmp_path)
