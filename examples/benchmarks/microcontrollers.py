"""Multiply-adds an instruction of products of half-precision matrices, on emulated chips.

    python examples/benchmarks/microcontrollers.py

Instructions are counted in QEMU (`qemu-system-arm`, `qemu-user`): they do not depend on this
machine. Each result is compared with `headrace.targets.fp16`, bit for bit.
"""

from __future__ import annotations

import numpy as np

from headrace.micro.kernels import matmul_half
from headrace.micro.kernels.table import kernel_table
from headrace.targets.compiler import compile_kernel
from headrace.targets.emulation.count import count_instructions
from headrace.targets.emulation.machines import why_not
from headrace.targets.target import Target, microcontrollers

SHAPES = ((24, 144, 64), (16, 27, 1024), (64, 64, 125))  # n, k, m


def rate(target: Target, code: bytes, shape: tuple[int, int, int]) -> float:
    """Multiply-adds an instruction."""
    n, k, m = shape
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(of).astype(np.float16) for of in ((n, k), (k, m)))
    c = np.zeros((n, m), np.float16)
    launch = matmul_half.slots(a, b, c), 1
    found = count_instructions(matmul_half.NAME, code, target, target.machines[0], [launch])
    if c.tobytes() != matmul_half.reference(target, a, b).tobytes():
        raise SystemExit(f"{target.name}: another result than numpy's")
    return n * k * m / found.instructions


def main() -> None:
    """Print a line for each chip."""
    row = kernel_table()[matmul_half.NAME]
    print("chip".ljust(12), *("x".join(map(str, shape)).rjust(12) for shape in SHAPES))
    for target in microcontrollers().values():
        if reason := why_not(target.machines[0]):
            print(target.name.ljust(12), reason)
            continue
        code = compile_kernel(row.build(target), target, row.name)
        rates = (f"{rate(target, code, shape):12.2f}" for shape in SHAPES)
        print(target.name.ljust(12), *rates, flush=True)


if __name__ == "__main__":
    main()
