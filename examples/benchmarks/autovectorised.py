"""What LLVM makes of plain loops: the baseline for kernels on vectors of RISC-V.

python examples/benchmarks/autovectorised.py [--target riscv64-v256] [--machine "qemu-... -cpu ..."]

A matrix of bytes, and one of INT4 in blocks of 32 (two codes in a byte, a scale for each block),
times a vector of bytes. No marker of ours for vectors is in these loops; they go through the
pipeline that compiles the kernels, and are counted as those are (an instruction on several
registers is several). Ours: `headrace targets test --report`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from headrace.costs import machine_for
from headrace.targets.compiler import compile_kernel
from headrace.targets.emulation.count import count_instructions
from headrace.targets.simd import arg_ptr, get_f32, get_i8, get_u8, put_f32, put_u32
from headrace.targets.target import all_targets

ROWS, INPUTS, BLOCK = 32, 512, 32
HALF = BLOCK // 2
BLOCK_BYTES = 4 + HALF  # a scale in float32 first: halves would cost more
int32, float32 = np.int32, np.float32


def int8(args: Any, thread: Any, n_threads: Any) -> None:
    w, x, y = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
    for row in range(ROWS):
        total = int32(0)
        for i in range(INPUTS):
            total = int32(total + int32(get_i8(w + (row * INPUTS + i))) * int32(get_i8(x + i)))
        put_u32(y + row * 4, total)


def int4(args: Any, thread: Any, n_threads: Any) -> None:
    w, x, y = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2)
    for row in range(ROWS):
        result = float32(0)
        for block in range(INPUTS // BLOCK):
            codes = w + (row * (INPUTS // BLOCK) + block) * BLOCK_BYTES
            inputs = x + block * BLOCK
            total = int32(0)
            for i in range(HALF):
                both = int32(get_u8(codes + (4 + i)))
                low, high = int32((both & 15) - 8), int32((both >> 4) - 8)
                total = int32(total + low * int32(get_i8(inputs + i)))
                total = int32(total + high * int32(get_i8(inputs + (HALF + i))))
            result = float32(result + get_f32(codes) * float32(total))
        put_f32(y + row * 4, result)


def slots(name: str, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Arguments of a loop, and what it must say."""
    x = rng.integers(-127, 128, INPUTS).astype(np.int8)
    if name == "int8":
        w = rng.integers(-127, 128, (ROWS, INPUTS)).astype(np.int8)
        return [w, x, np.zeros(ROWS, np.int32)], w.astype(np.int32) @ x
    codes = rng.integers(0, 16, (ROWS, INPUTS // BLOCK, 2, HALF)).astype(np.uint8)
    blocks = np.zeros((ROWS, INPUTS // BLOCK, BLOCK_BYTES), np.uint8)
    blocks[..., :4] = np.frombuffer(float32(0.5).tobytes(), np.uint8)
    blocks[..., 4:] = codes[..., 0, :] | codes[..., 1, :] << 4
    exact = 0.5 * ((codes.reshape(ROWS, INPUTS).astype(np.int32) - 8) @ x)
    return [blocks, x, np.zeros(ROWS, np.float32)], exact.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="riscv64-v256")
    parser.add_argument("--machine", help="default: the weakest one that the target is for")
    options = parser.parse_args()
    target = all_targets()[options.target]
    machine = options.machine or machine_for(target)
    for loop in (int8, int4):
        name = f"plain_{loop.__name__}"
        code = compile_kernel(loop, target, name=name)
        arguments, expected = slots(loop.__name__, np.random.default_rng(1))
        counts = count_instructions(name, code, target, machine, [(arguments, 1)])
        assert (arguments[2] == expected).all()
        each = counts.instructions / (ROWS * INPUTS)
        print(f"{name} for {target.name}: {each:.4f} instructions per multiply-add")


if __name__ == "__main__":
    main()
