"""Group-sparse products of many tokens beside our own dense INT4: time of a matrix, both in turns.

    python examples/benchmarks/sparse_prefill.py [--tokens 512] [--rate 0.5] [--target x86-64-v3]

Random weights of which the groups with the smallest are left out; dense products take 8-bit
activations too. Times are the best of all rounds; ratios are medians of those within each round, as
what else the machine does moves both.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from from_memory import aligned

from headrace.kernels import execute
from headrace.kernels.invoke import argument_block
from headrace.sparse import gqs, gqs_columns, linear
from headrace.sparse.registry import FORMATS
from headrace.sparse.token_pairs import pair_entries
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.team import Team, default_threads

SHAPES = ((4096, 4096), (11008, 4096), (576, 576), (1536, 576))
DENSE = ("q4_0", "i4_g32", "i4a_g32")


class Product:
    """A kernel with its arguments, and the seconds that it took."""

    def __init__(self, name: str, address: int, slots: list[Any]) -> None:
        self.name, self._slots = name, slots
        self._block = argument_block(slots)
        self._steps = np.zeros((1, execute.STEP_SLOTS), np.int64)
        self._steps[0, :3] = address, self._block.ctypes.data, execute.STEP_BARRIER
        self.times: list[float] = []

    def run(self, team: Team, repeats: int) -> None:
        """A round: the best of some runs."""
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            team.run(self._steps)
            found.append(time.perf_counter() - start)
        self.times.append(min(found))


def dense(store: KernelStore, name: str, w: np.ndarray, x: np.ndarray) -> Product:
    """The product of a format."""
    fmt, rows = FORMATS[name], len(w)
    kernel = linear.kernels(fmt)["gemm"]
    group = store.target.tokens(fmt.activation)
    padded = np.zeros((-(-len(x) // group) * group, x.shape[1]), np.float32)
    padded[: len(x)] = x
    coded = linear.quantize_q8(padded, group)
    coded = aligned(pair_entries(coded) if store.target.token_pairs else coded)
    y = np.zeros((len(padded), rows), np.float32)
    slots = [
        aligned(fmt.tile(fmt.encode(w))), coded, y, w.shape[1] // fmt.block, rows // 16,
        np.array([len(x)]), 0, y.strides[0], np.zeros(rows, np.float32), coded[0].nbytes,
    ]  # fmt: skip
    return Product(name, store.load([kernel])[kernel.name], slots)


def sparse(
    store: KernelStore, group: int, w: np.ndarray, x: np.ndarray, rate: float, threads: int
) -> Product:
    """The product with what is left of the weights."""
    rows, n = w.shape
    size = (w.reshape(rows, n // group, group) ** 2).mean(axis=2)
    raw = aligned(gqs.pack_weights(w, size > np.quantile(size, rate), group))
    kernel = gqs_columns.kernel_named(f"columns_gqs_g{group}")
    coded = aligned(gqs_columns.code_columns(x))
    y = np.zeros((len(coded) * gqs_columns.COLUMNS, rows), np.float32)
    scratch = aligned(np.zeros((threads, gqs_columns.scratch_bytes(n, group)), np.uint8))
    slots = [
        raw, raw[4 * rows + 4 :], raw[gqs.units_offset(rows) :], coded, y, rows,
        np.array([len(x)]), n, y.strides[0], np.zeros(rows, np.float32), coded.strides[0], scratch,
        scratch.shape[1],
    ]  # fmt: skip
    return Product(f"gqs_g{group}", store.load([kernel])[kernel.name], slots)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="a CPU level; default: the best of this CPU")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    store = KernelStore(pick_target(options.target))
    team = Team(store.load(execute.all_kernels()), options.threads)
    rng = np.random.default_rng(1)
    try:
        for rows, n in SHAPES:
            w = rng.standard_normal((rows, n), np.float32)
            x = rng.standard_normal((options.tokens, n), np.float32)
            sides = [dense(store, name, w, x) for name in DENSE]
            sides += [sparse(store, g, w, x, options.rate, options.threads) for g in gqs.GROUPS]
            repeats = 1 if rows * n > 1 << 22 else 10
            for _ in range(options.rounds):
                for side in sides:
                    side.run(team, repeats)
            print(
                f"\n{rows} x {n}, {options.tokens} tokens, {store.target.name}, "
                f"{options.threads} threads, {options.rate:.0%} left out"
            )
            print("| side | ms | " + " | ".join(f"times {name}" for name in DENSE) + " |")
            for side in sides:
                ratios = [
                    float(np.median(np.divide(other.times, side.times)))
                    for other in sides[: len(DENSE)]
                ]
                print(
                    f"| {side.name} | {min(side.times) * 1e3:.2f} | "
                    + " | ".join(f"{ratio:.2f}" for ratio in ratios)
                    + " |", flush=True,
                )  # fmt: skip
    finally:
        team.close()


if __name__ == "__main__":
    main()
