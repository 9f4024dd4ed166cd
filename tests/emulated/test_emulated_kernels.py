"""Every row of the kernel table, for every foreign target, on emulated CPUs."""

from __future__ import annotations

from typing import Any

import pytest
from foreign import FOREIGN, MOST, param

from headrace.kernels.table import kernel_table
from headrace.targets.emulation.cases import run_cases
from headrace.targets.emulation.run import IllegalInstructionError
from headrace.targets.target import Target

TABLE = kernel_table()
# What CI runs: each kind of kernel, for a format of one scale or one of several.
ONE = "gemv_q4_0"
PART = {
    ONE, "gemm_q4_0", "gemv_q4_k", "tile_q4_k", "rows_q4_0", "gemm_f16", "attention_decode_d64",
    "norm_q8", "convolution_f32", "convolution_u8",
}  # fmt: skip


PAIRED = "gemm_i4_g16"  # reads sums of half a block, which lie otherwise where tokens are paired


def spared(name: str, target: Target, machine: str) -> bool:
    """Can CI do without it?"""
    part = PART if target.name in MOST else {ONE}
    if target.token_pairs:
        part = {*part, PAIRED}
    return name not in part or machine != target.machines[0]


def rows() -> list[Any]:
    """Every kernel that has cases, on every machine of every target; CI takes a part."""
    names = [name for name in TABLE if not name.startswith("team_")]  # these need threads
    return [
        param(target, machine, name, slow=spared(name, target, machine))
        for target in FOREIGN.values()
        for machine in target.machines
        for name in names
    ]


def too_old() -> list[Any]:
    """Targets on CPUs that lack their instructions, with a kernel that uses them."""
    return [
        param(target, machine, "gemm_q4_0" if target.token_pairs else ONE)
        for target in FOREIGN.values()
        for machine in target.too_old
    ]


@pytest.mark.parametrize(("target_name", "machine", "name"), rows())
def test_kernel_equals_reference(target_name: str, machine: str, name: str) -> None:
    run_cases(TABLE[name], FOREIGN[target_name], machine)


@pytest.mark.parametrize(("target_name", "machine", "name"), too_old())
def test_an_older_cpu_stops_a_newer_build(target_name: str, machine: str, name: str) -> None:
    with pytest.raises(IllegalInstructionError):
        run_cases(TABLE[name], FOREIGN[target_name], machine)
