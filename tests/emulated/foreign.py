"""The targets of other architectures, and the machines that prove them."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.targets.host import same_architecture
from headrace.targets.target import Target, all_targets

FOREIGN = {name: t for name, t in all_targets().items() if t.machines and not same_architecture(t)}
# CI tests what most machines of an architecture are, and AArch64's i8mm, whose activations lie
# otherwise; of the other targets it tests one kernel.
USUAL = {
    "aarch64": "aarch64-dotprod",
    "armv7a": "armv7-neon",
    "riscv64": "riscv64-v256-zvfh",
    "wasm32": "wasm32",
}
MOST = {*USUAL.values(), *(name for name, target in FOREIGN.items() if target.token_pairs)}


def short(machine: str) -> str:
    """A machine's command line as part of a test's name."""
    return machine.split()[-1] if machine else "native"


def param(target: Target, machine: str, *values: Any, slow: bool = False) -> Any:
    """Parameters (target name, machine, values) of a test that runs there."""
    marks = [pytest.mark.target(target.name, machine), *([pytest.mark.slow] if slow else [])]
    names = [str(value) for value in values]
    return pytest.param(
        target.name,
        machine,
        *values,
        marks=marks,
        id="-".join([target.name, short(machine), *names]),
    )
