"""Compile the kernels that a test run needs on all cores, before its first test.

Compiling is what a run with an empty cache spends most of its time on, and one process compiles on
one core. Tests themselves run one after the other: many start thread teams that want the cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

from headrace.errors import KernelError
from headrace.kernels import attention
from headrace.kernels.table import kernel_table
from headrace.targets.cache import KernelStore
from headrace.targets.table import Kernel
from headrace.targets.target import all_targets

Pair = tuple[str, str]  # (kernel, target)

HEADS = (32, 48)  # head sizes of the models in tests/data that the table has no row of
PROCESSES = min(os.cpu_count() or 1, 8)
WORTH_IT = 8  # fewer are compiled by the tests themselves


def all_rows() -> dict[str, Kernel]:
    """The table, and what the tests' models need beyond it."""
    more = (kernel for head in HEADS for kernel in attention.kernels(head).values())
    return kernel_table() | {kernel.name: kernel for kernel in more}


def missing(pairs: Iterable[Pair]) -> list[Pair]:
    """Those that are not in the cache, the slowest to compile first."""
    rows, targets = all_rows(), all_targets()
    absent = {
        (name, target)
        for name, target in pairs
        if not KernelStore(targets[target]).is_cached(rows[name])
    }
    return sorted(absent, key=lambda pair: (not pair[0].startswith("attention"), pair))


def compile_ahead(pairs: Iterable[Pair]) -> None:
    """Compile what is missing in several processes; what fails will fail again in its test."""
    pairs = missing(pairs)
    if len(pairs) < WORTH_IT or PROCESSES < 2:
        return
    print(f"compiling {len(pairs)} kernels in {PROCESSES} processes ...", flush=True)
    children = [
        subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    try:
        for i, child in enumerate(children):
            assert child.stdin is not None
            with child.stdin as pipe:
                pipe.writelines(f"{name} {target}\n" for name, target in pairs[i::PROCESSES])
        for child in children:
            child.wait()
    finally:
        for child in children:
            child.kill()
            child.wait()


def main() -> None:
    """Compile the pairs that stand on stdin, one a line."""
    rows, targets = all_rows(), all_targets()
    for line in sys.stdin:
        name, target = line.split()
        try:
            KernelStore(targets[target]).objects([rows[name]])
        except KernelError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
