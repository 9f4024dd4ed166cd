"""Compile the kernels that a test run needs on all cores, before its first test.

Compiling is what a run with an empty cache spends most of its time on. Tests themselves run one
after the other: many start thread teams that want the cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from headrace.errors import KernelError
from headrace.kernels import attention
from headrace.kernels.table import kernel_table
from headrace.micro.kernels.table import kernel_table as micro_kernel_table
from headrace.targets.cache import KernelStore
from headrace.targets.table import Kernel
from headrace.targets.target import all_targets, microcontrollers

Pair = tuple[str, str]  # (kernel, target)

HEADS = (32, 48)  # head sizes of the models in tests/data that the table has no row of
PROCESSES = min(os.cpu_count() or 1, 8)


def all_rows() -> dict[str, Kernel]:
    """The table, and what the tests' models need beyond it."""
    more = (kernel for head in HEADS for kernel in attention.kernels(head).values())
    return kernel_table() | {kernel.name: kernel for kernel in more}


def compile_ahead(pairs: Iterable[Pair]) -> None:
    """Compile what is missing, target by target; what fails will fail again in its test."""
    rows, targets = all_rows(), all_targets()
    chip_rows, chips = micro_kernel_table(), microcontrollers()
    wanted: dict[str, set[str]] = {}
    for name, target in pairs:
        wanted.setdefault(target, set()).add(name)
    for target, names in sorted(wanted.items()):

        def report(done: int, total: int, what: str, target: str = target) -> None:
            if done == 0:
                print(f"compiling {total} kernels for {target} ...", flush=True)

        try:
            known = chip_rows if target in chips else rows
            store = KernelStore((chips if target in chips else targets)[target], PROCESSES)
            store.objects([known[name] for name in sorted(names)], report)
        except KernelError as error:
            print(error, flush=True)
