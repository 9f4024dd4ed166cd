"""Seconds of a call of ONNX models, beside onnxruntime's, and how far the outputs are apart.

    python onnx_networks.py MODEL.onnx ... [--threads 2] [--rounds 10] [--input DIMENSION=SIZE]

Both sides take turns, some calls each a round, on the same random inputs, in one process;
onnxruntime has all its optimisations. Threads of either side spin for a while after a call, so a
turn begins with a pause and a call that is not counted. The ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnxruntime

import headrace
from headrace.networks.measure import assumed_types, random_input

PAUSE_S, CALLS = 0.1, 5  # of a turn


def timed(function: Any) -> tuple[float, Any]:
    """Seconds of the median call of a turn, and what came out."""
    time.sleep(PAUSE_S)
    found = function()
    taken = []
    for _ in range(CALLS):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)), found


def measure(path: str, threads: int, rounds: int, sizes: dict[str, int]) -> dict[str, Any]:
    """A row of the table."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with headrace.load(path, threads=threads) as network:
        random = np.random.default_rng(0)
        types = assumed_types(network, sizes)
        inputs = {name: random_input(of, random) for name, of in types.items()}
        sides = (lambda: network(inputs), lambda: session.run(None, inputs))
        for side in sides:
            side()
        taken: list[tuple[float, float]] = []
        for i in range(rounds):
            order = (0, 1) if i % 2 else (1, 0)
            found = {side: timed(sides[side]) for side in order}
            taken.append((found[0][0], found[1][0]))
        ours, theirs = found[0][1], dict(zip(found[0][1], found[1][1], strict=True))
        off = max(float(np.abs(np.float64(ours[name]) - theirs[name]).max()) for name in ours)
        on = network.plan(inputs).where()
    mine, others = np.array(taken).T
    return {
        "model": path.rpartition("/")[2], "ours_ms": mine.min() * 1e3,
        "onnxruntime_ms": others.min() * 1e3, "ratio": float(np.median(others / mine)),
        "apart": off,
        "nodes_on_ours": sum(len(n) for kind, n in on if kind == "headrace"),
        "nodes": sum(len(n) for _, n in on),
    }  # fmt: skip


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--input", action="append", default=[], help="DIMENSION=SIZE")
    args = parser.parse_args()
    sizes = {name: int(n) for name, _, n in (text.partition("=") for text in args.input)}
    print("| model | headrace, ms | onnxruntime, ms | times as fast | apart | nodes on ours |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for path in args.models:
        row = measure(path, args.threads, args.rounds, sizes)
        print(
            f"| {row['model']} | {row['ours_ms']:.2f} | {row['onnxruntime_ms']:.2f} | "
            f"{row['ratio']:.2f} | {row['apart']:.1e} | {row['nodes_on_ours']} of {row['nodes']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
