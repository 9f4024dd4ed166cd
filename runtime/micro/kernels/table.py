"""The kernels of microcontrollers: rows as in `headrace.targets.table`."""

from __future__ import annotations

from headrace.micro.kernels import convolution_i8, matmul_half, matmul_i8
from headrace.targets.table import Kernel


def kernel_table() -> dict[str, Kernel]:
    """Every kernel by name; tests loop over it."""
    modules = (convolution_i8, matmul_half, matmul_i8)
    return {row.name: row for module in modules for row in module.all_kernels()}
