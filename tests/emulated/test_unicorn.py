"""Unicorn stands in for QEMU where that is not installed: the same results and the same counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from foreign import FOREIGN

from headrace.costs import cost
from headrace.kernels.table import kernel_table
from headrace.sparse.registry import FORMATS
from headrace.targets.emulation import unicorn_user
from headrace.targets.emulation.cases import run_cases
from headrace.targets.emulation.machines import command_of, why_not
from headrace.targets.emulation.run import IllegalInstructionError

pytest.importorskip("unicorn")
KERNEL = kernel_table()["gemv_q4_0"]
A76 = "qemu-aarch64 -cpu cortex-a76"


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH on which everything is found but QEMU."""
    real = shutil.which

    def which(name: str, **options: object) -> str | None:
        return None if name.startswith("qemu-") else real(name)

    monkeypatch.setattr(shutil, "which", which)
    assert os.environ["PATH"]


def programs() -> list[tuple[str, str]]:
    """Targets with the machines that Unicorn has a model of."""
    return [
        (target.name, machine)
        for target in FOREIGN.values()
        for machine in target.machines
        if machine in unicorn_user.MODELS
    ]


@pytest.mark.parametrize(("target_name", "machine"), programs())
def test_kernel_equals_reference(no_qemu: None, target_name: str, machine: str) -> None:
    if missing := why_not(machine):
        pytest.skip(missing)
    assert command_of(machine) == unicorn_user.command(machine)
    run_cases(KERNEL, FOREIGN[target_name], machine)


def test_an_older_cpu_stops_a_newer_build(no_qemu: None) -> None:
    machine = "qemu-aarch64 -cpu cortex-a53"
    if missing := why_not(machine):
        pytest.skip(missing)
    with pytest.raises(IllegalInstructionError):
        run_cases(KERNEL, FOREIGN["aarch64-dotprod"], machine)


def test_what_it_lacks_is_said(no_qemu: None) -> None:
    assert command_of("qemu-riscv64 -cpu rv64,v=false") is None
    assert "qemu-riscv64 is not installed" in str(why_not("qemu-riscv64 -cpu rv64,v=false"))


def test_it_counts_what_qemu_counts(request: pytest.FixtureRequest) -> None:
    if missing := why_not(A76) or (None if shutil.which("qemu-aarch64") else "no QEMU here"):
        pytest.skip(missing)
    target, fmt = FOREIGN["aarch64-dotprod"], FORMATS["q4_0"]
    by_qemu = cost(target, "gemv", fmt.name)
    request.getfixturevalue("no_qemu")
    assert cost(target, "gemv", fmt.name).instructions == by_qemu.instructions
