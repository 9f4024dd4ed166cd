"""The kernels of microcontrollers: rows as in `headrace.targets.table`."""

from __future__ import annotations

from dataclasses import replace

from headrace.micro.kernels import (
    add_i8,
    convert,
    convolution_i8,
    depthwise,
    depthwise_gradient,
    depthwise_i8,
    elementwise,
    learning,
    lookup_i8,
    lookup_single,
    matmul,
    matmul_i8,
    move,
    multiply_i8,
    pad,
    place,
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
    convert,
    convolution_i8,
    depthwise,
    depthwise_gradient,
    depthwise_i8,
    elementwise,
    learning,
    lookup_i8,
    lookup_single,
    matmul,
    matmul_i8,
    move,
    multiply_i8,
    pad,
    place,
    pool,
    pool_i8,
    softmax,
    softmax_i8,
    sums_i8,
    turn,
)


def kernel_table() -> dict[str, Kernel]:
    """Every kernel by name."""
    rows = (replace(row, owner=__name__) for module in _MODULES for row in module.all_kernels())
    return {row.name: row for row in rows}


def kernel_named(name: str) -> Kernel:
    """One of them."""
    return kernel_table()[name]
