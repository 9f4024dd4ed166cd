"""What `headrace targets test` does: prove kernels on targets, and report what they cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import KernelError
from headrace.sparse.registry import FORMATS
from headrace.targets.emulation.machines import NATIVE, why_not
from headrace.targets.features import host_features
from headrace.targets.host import runnable_targets, same_architecture
from headrace.targets.pack import Pack, build
from headrace.targets.systems import system_name
from headrace.targets.table import Kernel
from headrace.targets.target import Target, microcontrollers


@dataclass(frozen=True)
class Outcome:
    """What became of a kernel (or of all, "*") of a target on a machine.

    Attributes:
        result: "equal" (to its reference), "failed" or "skipped".
        how: "bit for bit" or "within its bound"; else the reason.
    """

    target: str
    machine: str
    kernel: str
    result: str
    how: str


def kernels_for(target: Target) -> dict[str, Kernel]:
    """Kernels of a target by name: microcontrollers have their own."""
    if target.name in microcontrollers():
        from headrace.micro.kernels.table import kernel_table as chip_kernels

        return chip_kernels()
    from headrace.kernels.table import kernel_table

    return kernel_table()


def machines_of(target: Target) -> list[tuple[str, str | None]]:
    """Where a target can be proven, each with what is missing for it here (None: nothing)."""
    if system_name(target) != "linux":
        return [(NATIVE, "kernels are run on Linux only")]
    if not same_architecture(target):
        return [(machine, why_not(machine)) for machine in target.machines]
    if target.name in {one.name for one in runnable_targets()}:
        return [(NATIVE, why_not(NATIVE))]
    return [(NATIVE, "this CPU lacks " + ", ".join(sorted(target.needs - host_features())))]


def outcomes(targets: Iterable[Target], kernels: Iterable[Kernel]) -> Iterator[Outcome]:
    """Run kernels' cases for targets on all machines that are here, one after the other."""
    kernels = list(kernels)
    for target in targets:
        for machine, missing in machines_of(target):
            where = machine or "this CPU"
            if missing:
                yield Outcome(target.name, where, "*", "skipped", missing)
                continue
            for kernel in kernels:
                yield Outcome(target.name, where, kernel.name, *_run(kernel, target, machine))


def _run(kernel: Kernel, target: Target, machine: str) -> tuple[str, str]:
    from headrace.targets.emulation.cases import THREADS, run_cases  # needs llvmlite

    if next(kernel.cases(target, np.random.default_rng(1)), None) is None:
        return "skipped", "it has no cases of its own: it runs whole models"
    threads = (1,) if target.name in microcontrollers() else THREADS
    try:
        run_cases(kernel, target, machine, threads)
    except KernelError as error:
        return "failed", str(error)
    return "equal", "bit for bit" if kernel.bit_exact(target) else "within its bound"


def report(target: Target, kernels: Iterable[Kernel], machine: str) -> dict[str, Any]:
    """What a target's matrix products cost on a machine, and the size of a pack with `kernels`.

    "instructions" are those for each multiply-add, "loads" the bytes that are loaded for each byte
    of weights: of one token in GEMV, of as many as are taken at once in GEMM.

    Raises:
        KernelError: something cannot be compiled, run or counted here.
    """
    from headrace.costs import OPERATIONS, cost  # needs llvmlite

    rows: list[dict[str, Any]] = []
    for name in FORMATS:
        row: dict[str, Any] = {"format": name}
        for operation in OPERATIONS:
            found = cost(target, operation, name, machine)
            row[f"{operation} instructions"] = round(found.instructions, 4)
            if found.loads is not None:
                row[f"{operation} loads"] = round(found.loads, 3)
        rows.append(row)
    facts = {"target": target.name, "counted_on": machine or "this CPU"}
    return {**facts, "pack_bytes": _pack_bytes(target, kernels), "costs": rows}


def _pack_bytes(target: Target, kernels: Iterable[Kernel]) -> int | None:
    if target.architecture == "wasm32":  # has no shared libraries
        return None
    with tempfile.TemporaryDirectory(prefix="headrace-report-") as folder:
        return Pack(build([target], list(kernels), folder)).n_bytes
