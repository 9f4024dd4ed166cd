"""Multiply-adds an instruction of products of matrices, on emulated chips.

    python examples/benchmarks/microcontrollers.py

Instructions are counted in QEMU (`qemu-system-arm`, `qemu-user`): they do not depend on this
machine. Each result is compared with numpy's, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.micro.kernels import matmul, matmul_i8
from headrace.micro.kernels.numbers import numbers_of
from headrace.micro.kernels.table import kernel_table
from headrace.targets.compiler import compile_kernel
from headrace.targets.emulation.count import count_instructions
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import Target, microcontrollers

SHAPES = {  # n, k, m
    matmul.NAME: ((24, 144, 64), (16, 27, 1024), (64, 64, 125)),
    matmul_i8.NAME: ((24, 144, 64), (16, 64, 64), (64, 576, 64)),
}


def product(kernel: str, target: Target, n: int, k: int, m: int) -> tuple[list[Any], Any, Any]:
    """The argument block of a product, its output and what that shall be."""
    rng = np.random.default_rng(0)
    if kernel == matmul.NAME:
        a, b = (rng.standard_normal(of).astype(np.float16) for of in ((n, k), (k, m)))
        c, start = np.zeros((n, m), np.float16), np.zeros(m, np.float16)
        expected = matmul.reference(numbers_of(target, "half"), a, b, start)
        return matmul.slots(a, b, c, start), c, expected
    a, b = (rng.integers(-127, 128, of).astype(np.int8) for of in ((n, k), (m, k)))
    c, ends = np.zeros((n, m), np.int8), (0, -128, 127)
    scaling = (np.zeros(m, np.int32), np.full(m, 1700000000, np.int32), np.full(m, -12, np.int32))
    expected = matmul_i8.reference(a, b, *scaling, *ends)
    return matmul_i8.slots(target, a, b, *scaling, c, *ends), c, expected


def rate(kernel: str, target: Target, code: bytes, shape: tuple[int, int, int]) -> float:
    """Multiply-adds an instruction."""
    slots, found, expected = product(kernel, target, *shape)
    counts = count_instructions(kernel, code, target, target.machines[0], [(slots, 1)])
    if found.tobytes() != expected.tobytes():
        raise SystemExit(f"{kernel} of {target.name}: another result than numpy's")
    n, k, m = shape
    return n * k * m / counts.instructions


def main() -> None:
    """Print a table for each kernel."""
    for kernel, shapes in SHAPES.items():
        row = kernel_table()[kernel]
        print(kernel.ljust(12), *("x".join(map(str, shape)).rjust(12) for shape in shapes))
        for target in microcontrollers().values():
            if reason := why_not(target.machines[0]):
                print(target.name.ljust(12), reason)
                continue
            code = compile_kernel(row.build(target), target, kernel)
            rates = (f"{rate(kernel, target, code, shape):12.3g}" for shape in shapes)
            print(target.name.ljust(12), *rates, flush=True)


if __name__ == "__main__":
    main()
