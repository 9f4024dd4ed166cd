"""Products of one token from memory: share of its bandwidth, and speed beside INT4.

    python examples/benchmarks/low_bits.py [--formats i4_g32 mxfp4 nvfp4] [--target x86-64-v3]

Every pass goes through copies of a matrix that fill 256 MB on huge pages, formats and a kernel that
only reads take turns. Times are the tenth percentile of all passes over one matrix; share of memory
and ratios are medians of those within each turn, as what else the machine does moves both. The
first format is what the others are compared with. The kernel is the one of decode: "gemv2" (16-bit
activations) on CPUs with VNNI, else "gemv"; --gemv takes it everywhere.
"""

from __future__ import annotations

import argparse

import numpy as np
from from_memory import dense, reading

from headrace.kernels import execute, probe
from headrace.sparse import linear
from headrace.sparse.registry import FORMATS
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.team import Team, default_threads

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


def measure(
    store: KernelStore, team: Team, shape: tuple[int, int], names: list[str], operation: str,
    rounds: int,
) -> None:  # fmt: skip
    """One shape: a line for each format."""
    rng = np.random.default_rng(1)
    rows, n = shape
    w = rng.standard_normal((rows, n), np.float32)
    x, y = rng.standard_normal((1, n), np.float32), np.zeros((1, rows), np.float32)
    of = {name: "gemv" if FORMATS[name].activation == "tables" else operation for name in names}
    addresses = store.load([linear.kernels(FORMATS[name])[of[name]] for name in names])
    sides = [dense(name, of[name], addresses[f"{of[name]}_{name}"], w, x, y) for name in names]
    memory = reading(store.load([probe.kernel()])["probe_read"], team.n_threads)
    for _ in range(rounds):
        for side in (memory, *sides):
            side.run(team)
    bandwidth = memory.n_bytes / memory.best
    print(
        f"\n{rows} x {n}, {operation}, {store.target.name}, {team.n_threads} threads, "
        f"memory reads {bandwidth / 1e9:.1f} GB/s"
    )
    print(f"| format | bits | us | GB/s | share of memory | times {names[0]} |")
    for name, side in zip(names, sides, strict=True):
        share, faster = side.speed_beside(memory), side.speed_beside(sides[0])
        print(
            f"| {name} | {8 * side.n_bytes / w.size:.3g} | {side.best * 1e6:.1f} "
            f"| {side.n_bytes / side.best / 1e9:.1f} | {share:.0%} "
            f"| {faster * sides[0].n_bytes / side.n_bytes:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["i4_g32", "q4_0", "mxfp4", "nvfp4"])
    parser.add_argument("--target", help="a CPU level; default: the best of this CPU")
    parser.add_argument("--gemv", action="store_true", help="8-bit activations everywhere")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    store = KernelStore(pick_target(options.target))
    operation = "gemv2" if store.target.decode_pairs and not options.gemv else "gemv"
    addresses = store.load(execute.all_kernels())
    team = Team(addresses, options.threads)
    try:
        for shape in SHAPES[: options.shapes]:
            measure(store, team, shape, options.formats, operation, options.rounds)
    finally:
        team.close()


if __name__ == "__main__":
    main()
