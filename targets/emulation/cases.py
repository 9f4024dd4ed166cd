"""Run the cases of a row of the kernel table on a machine, and compare with its reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.errors import KernelError
from headrace.targets.cache import KernelStore
from headrace.targets.compare import check
from headrace.targets.emulation.run import run
from headrace.targets.table import Kernel
from headrace.targets.target import Target

THREADS = (1, 3)  # shares of the work, one after the other


def run_cases(
    kernel: Kernel, target: Target, machine: str, threads: Sequence[int] = THREADS
) -> None:
    """Run all of a kernel's cases, each with the shares of so many threads.

    Args:
        kernel, target: what is run; it is compiled if the cache does not have it.
        machine: as in `headrace.targets.emulation.run.run`.
        threads: kernels of microcontrollers know of one.

    Raises:
        WrongResultError: a result is not the reference's.
        IllegalInstructionError: the machine lacks an instruction.
        KernelError: the kernel has no cases, does not compile, fails, or stores beside an array.
    """
    code = KernelStore(target).objects([kernel])[kernel.name]
    # A case owns its outputs: make it anew for every number of threads, from the same seed.
    launches = [
        (case, n_threads)
        for n_threads in threads
        for case in kernel.cases(target, np.random.default_rng(1))
    ]
    if not launches:
        raise KernelError(f"kernel {kernel.name} has no cases")
    run(kernel.name, code, target, machine, [(case.slots, n) for case, n in launches])
    for case, _ in launches:
        check(case)
