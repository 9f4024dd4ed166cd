"""The kernels of microcontrollers: rows as in `headrace.targets.table`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from headrace.targets.target import Target

_OF_CODES = (
    add_i8,
    convolution_i8,
    depthwise_i8,
    lookup_i8,
    lookup_single,
    matmul_i8,
    move,
    multiply_i8,
    place,
    pool_i8,
    softmax_i8,
    sums_i8,
)
_OF_NUMBERS = (
    convert, depthwise, depthwise_gradient, elementwise, learning, matmul, pad, pool, softmax, turn,
)  # fmt: skip


def kernel_table() -> dict[str, Kernel]:
    """Every kernel by name."""
    return _rows(*_OF_CODES, *_OF_NUMBERS)


def kernels_of(target: Target) -> dict[str, Kernel]:
    """Those that run on a chip: without a floating-point unit, only those of codes."""
    return _rows(*_OF_CODES, *(_OF_NUMBERS if target.floats else ()))


def kernel_named(name: str) -> Kernel:
    """One of them."""
    return kernel_table()[name]


def _rows(*modules: Any) -> dict[str, Kernel]:
    rows = (replace(row, owner=__name__) for module in modules for row in module.all_kernels())
    return {row.name: row for row in rows}
