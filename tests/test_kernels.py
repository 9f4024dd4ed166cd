"""Every row of the kernel table, on every target that this CPU runs, against its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_harness import call
from targets_here import TARGETS, WHOLE, spared_kernel

from headrace.kernels.table import kernel_table
from headrace.targets.cache import KernelStore
from headrace.targets.compare import check
from headrace.targets.target import Target

TABLE = kernel_table()
_stores: dict[str, KernelStore] = {}

# What CI runs on targets that it does not test whole: one kernel of each kind.
FEW = {
    "gemm_q4_0", "gemm_q8_0", "gemv_q4_k", "gemv_f16", "norm_q8", "rows_f16",
}  # fmt: skip


def _spared(name: str, target: str) -> bool:
    return spared_kernel(name, target) if target in WHOLE else name not in FEW


def rows() -> list[Any]:
    """Every kernel on every target; `slow` are those that CI can do without."""
    found = []
    for name in TABLE:
        for target in TARGETS:
            marks = [pytest.mark.slow] if _spared(name, target) else []
            found.append(pytest.param(name, target, marks=marks))
    return found


def store_for(target: Target) -> KernelStore:
    return _stores.setdefault(target.name, KernelStore(target))


@pytest.mark.parametrize(("name", "target_name"), rows())
def test_kernel_equals_reference(name: str, target_name: str) -> None:
    target, kernel = TARGETS[target_name], TABLE[name]
    address = store_for(target).load([kernel])[name]
    for n_threads in (1, 2, 3):
        # A case owns its outputs: make it anew for every number of threads, from the same seed.
        for case in kernel.cases(target, np.random.default_rng(1)):
            call(address, case.slots, n_threads)
            check(case)
