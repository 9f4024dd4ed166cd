"""Instructions per multiply-add of llama.cpp's products, in the counter that counts ours.

python examples/benchmarks/products.py PROGRAM gemv_8x8 gemm_8x8 [--machine "qemu-... -cpu ..."]

PROGRAM is llama_products.cpp, built for the CPU of `--machine`; without that it is run on this x86
CPU, step by step. Ours: `headrace targets test --report`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from headrace.targets.emulation.count import PROGRAM, count_program
from headrace.targets.emulation.stepping import count_steps

ROWS, INPUTS, TOKENS = 32, 512, {"gemv": 1, "gemm": 16}
FEW, MORE = 1, 3


def count(machine: str, command: list[str]) -> int:
    """Instructions of one run."""
    if machine:
        return count_program(machine, command)[0]
    return count_steps(command, b"", *PROGRAM)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path)
    parser.add_argument("kinds", nargs="+", help="such as gemv_8x8")
    parser.add_argument("--machine", default="")
    options = parser.parse_args()
    program = str(options.program.resolve())
    for kind in options.kinds:
        few, more = (count(options.machine, [program, kind, str(n)]) for n in (FEW, MORE))
        products = ROWS * INPUTS * TOKENS[kind[:4]] * (MORE - FEW)
        print(f"{kind}: {(more - few) / products:.4f} instructions per multiply-add")


if __name__ == "__main__":
    main()
