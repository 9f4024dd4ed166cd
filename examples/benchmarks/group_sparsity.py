"""Group-sparse matrix times vector beside our own dense INT4, from memory.

    python examples/benchmarks/group_sparsity.py [--threads 2] [--rate 0.5] [--rounds 31]

Random weights whose rows differ in size, so that rows keep different numbers of groups; half of all
groups are left out (`--rate`). Every pass goes through copies of the matrix that fill 256 MB on
huge pages, and all sides take turns. Dense are our INT4 formats with groups of 32 weights and 8-bit
activations (`gemv`), and q4_0 with 16-bit ones, as decode runs it on CPUs with VNNI (`gemv2`).
Ratios are to the one of them that is fastest, in the same round, as what else the machine does
moves both: the median of the rounds, and the largest. Times and rates are of the fastest tenth of
all matrices.
Imbalance is the longest share of a matrix over the mean share, each timed alone on one core.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from from_memory import Side, aligned, dense, reading

from headrace.kernels import execute, probe
from headrace.sparse import gqs, gqs_kernels, linear
from headrace.sparse.registry import FORMATS
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.team import Team, default_threads

SHAPES = ((4096, 4096), (11008, 4096))
DENSE = (("q4_0", "gemv"), ("q4_0", "gemv2"), ("i4_g32", "gemv"), ("i4a_g32", "gemv"))
ASKED = {16: 1.2, 32: 1.45, 64: 1.6}
SHARES = (2, 4, 8)


def sparse(
    group: int, address: int, w: np.ndarray, x: np.ndarray, y: np.ndarray, rate: float
) -> Side:
    """The groups of the largest weights, of the whole matrix."""
    rows, n = w.shape
    size = (w.reshape(rows, n // group, group) ** 2).mean(axis=2)
    raw = gqs.pack_weights(w, size > np.quantile(size, rate), group)
    coded, one = aligned(gqs_kernels.code_x16(x)), np.ones(1, np.int64)
    bias = np.zeros(rows, np.float32)

    def slots(at: int) -> list[Any]:
        units = at + gqs.units_offset(rows)
        scales = at + 4 * rows + 4
        return [
            at, scales, units, coded, y, rows, one, 0, y.strides[0], bias, coded.strides[0]
        ]  # fmt: skip

    return Side(f"gqs g{group}", address, raw, slots)


def measure(
    store: KernelStore, team: Team, shape: tuple[int, int], rate: float, rounds: int
) -> None:
    """One shape: a line for each side."""
    rng = np.random.default_rng(1)
    rows, n = shape
    w = rng.standard_normal((rows, n), np.float32)
    w *= np.exp(rng.standard_normal((rows, 1)) * 0.1).astype(np.float32)
    x, y = rng.standard_normal((1, n), np.float32), np.zeros((1, rows), np.float32)
    products = [linear.kernels(FORMATS[name])[operation] for name, operation in DENSE]
    addresses = store.load([*products, *gqs_kernels.all_kernels()])
    sides = [
        dense(*which, addresses[k.name], w, x, y) for which, k in zip(DENSE, products, strict=True)
    ]
    sides += [sparse(g, addresses[f"gemm_gqs_g{g}"], w, x, y, rate) for g in gqs.GROUPS]
    memory = reading(store.load([probe.kernel()])["probe_read"], team.n_threads)
    for _ in range(rounds):
        for side in (memory, *sides):
            side.run(team)
    bandwidth = memory.n_bytes / memory.best
    baseline = min((side.passes for side in sides[: len(DENSE)]), key=np.median)
    print(f"\n{rows} x {n}, {team.n_threads} threads, memory reads {bandwidth / 1e9:.1f} GB/s")
    print(
        "| side | bits | us | GB/s | share of memory | times dense | at most | asked | imbalance "
        + " / ".join(f"of {k}" for k in SHARES)
        + " |"
    )
    for side, group in zip(sides, [*[None] * len(DENSE), *gqs.GROUPS], strict=True):
        rate_read, ratios = side.n_bytes / side.best, baseline / side.passes
        uneven = " / ".join(f"{side.imbalance(k):.3f}" for k in SHARES) if group else ""
        print(
            f"| {side.name} | {8 * side.n_bytes / w.size:.2f} | {side.best * 1e6:.1f} "
            f"| {rate_read / 1e9:.1f} | {rate_read / bandwidth:.0%} | {np.median(ratios):.2f} "
            f"| {ratios.max():.2f} | {ASKED.get(group or 0, '')} | {uneven} |", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    store = KernelStore(pick_target())
    addresses = store.load(execute.all_kernels())
    team = Team(addresses, options.threads)
    try:
        for shape in SHAPES:
            measure(store, team, shape, options.rate, options.rounds)
    finally:
        team.close()


if __name__ == "__main__":
    main()
