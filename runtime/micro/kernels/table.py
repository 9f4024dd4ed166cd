"""The kernels of microcontrollers: rows as in `headrace.targets.table`."""

from __future__ import annotations

from headrace.micro.kernels import matmul_half, matmul_i8, move
from headrace.targets.table import Kernel


def kernel_table() -> dict[str, Kernel]:
    """Every kernel by name; tests loop over it."""
    return {
        row.name: row
        for row in (*matmul_half.all_kernels(), *matmul_i8.all_kernels(), *move.all_kernels())
    }
