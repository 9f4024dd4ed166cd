"""Every row of the kernel table, on every target that this CPU runs, against its reference."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import call, check

from headrace.kernels.table import kernel_table
from headrace.targets.cache import KernelStore
from headrace.targets.host import runnable_targets
from headrace.targets.target import Target

TABLE = kernel_table()
TARGETS = {target.name: target for target in runnable_targets()}
_stores: dict[str, KernelStore] = {}


def store_for(target: Target) -> KernelStore:
    return _stores.setdefault(target.name, KernelStore(target))


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("name", TABLE)
def test_kernel_equals_reference(name: str, target_name: str) -> None:
    target, kernel = TARGETS[target_name], TABLE[name]
    address = store_for(target).load([kernel])[name]
    for n_threads in (1, 2, 3):
        # A case owns its outputs: make it anew for every number of threads, from the same seed.
        for case in kernel.cases(target, np.random.default_rng(1)):
            call(address, case.slots, n_threads)
            check(case)
