"""The kernels of microcontrollers: rows as in `headrace.targets.table`."""

from __future__ import annotations

from headrace.micro.kernels import (
    depthwise,
    elementwise,
    learning,
    matmul,
    matmul_i8,
    move,
    pad,
    pool,
    softmax,
    turn,
)
from headrace.targets.table import Kernel

_MODULES = (matmul, matmul_i8, move, pad, depthwise, pool, elementwise, softmax, turn, learning)


def kernel_table() -> dict[str, Kernel]:
    """Every kernel by name; tests loop over it."""
    return {row.name: row for module in _MODULES for row in module.all_kernels()}
