"""The kernels of microcontrollers: rows as in `headrace.targets.table`."""

from __future__ import annotations

from headrace.micro.kernels import (
    add_i8,
    convolution_i8,
    depthwise,
    depthwise_i8,
    elementwise,
    learning,
    lookup_i8,
    matmul,
    matmul_i8,
    move,
    pad,
    pool,
    pool_i8,
    softmax,
    softmax_i8,
    sums_i8,
    turn,
)
from headrace.targets.table import Kernel

_MODULES = (
    add_i8,
    convolution_i8,
    depthwise,
    depthwise_i8,
    elementwise,
    learning,
    lookup_i8,
    matmul,
    matmul_i8,
    move,
    pad,
    pool,
    pool_i8,
    softmax,
    softmax_i8,
    sums_i8,
    turn,
)


def kernel_table() -> dict[str, Kernel]:
    """Every kernel by name; tests loop over it."""
    return {row.name: row for module in _MODULES for row in module.all_kernels()}
