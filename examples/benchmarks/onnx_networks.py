"""Seconds of a call of ONNX models, beside onnxruntime's, and how far the outputs are apart.

    python onnx_networks.py MODEL.onnx ... [--threads 2] [--rounds 10] [--input DIMENSION=SIZE]
        [--input NAME=FILE.npy] [--against FLOAT.onnx]

With `--against`, onnxruntime also runs that file: what a model was quantised from, say. All sides
take turns, some calls each a round, on the same inputs, given or random ones, in one process;
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


def session_of(path: str, threads: int) -> Any:
    """onnxruntime's side."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(
    path: str, threads: int, rounds: int, sizes: dict[str, int], given: dict[str, np.ndarray],
    against: str | None,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table."""
    sessions = [session_of(one, threads) for one in (path, against) if one is not None]
    with headrace.load(path, threads=threads) as network:
        random = np.random.default_rng(0)
        types = assumed_types(network, sizes)
        inputs = {name: random_input(of, random) for name, of in types.items()} | given
        theirs_of = [lambda session=one: session.run(None, inputs) for one in sessions]
        sides = [lambda: network(inputs), *theirs_of]
        for side in sides:
            side()
        taken: list[list[float]] = []
        for i in range(rounds):
            order = range(len(sides)) if i % 2 else reversed(range(len(sides)))
            found = {side: timed(sides[side]) for side in order}
            taken.append([found[side][0] for side in range(len(sides))])
        ours, theirs = found[0][1], dict(zip(found[0][1], found[1][1], strict=True))
        off = max(float(np.abs(np.float64(ours[name]) - theirs[name]).max()) for name in ours)
        on = network.plan(inputs).where()
    mine, others, *rest = np.array(taken).T
    more = {}
    if rest:
        more = {"against_ms": rest[0].min() * 1e3, "against": float(np.median(rest[0] / mine))}
    return more | {
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
    parser.add_argument("--against", help="another file that onnxruntime runs")
    more = "DIMENSION=SIZE or NAME=FILE.npy"
    parser.add_argument("--input", action="append", default=[], help=more)
    args = parser.parse_args()
    pairs = dict(text.split("=", 1) for text in args.input)
    sizes = {name: int(value) for name, value in pairs.items() if value.isdigit()}
    given = {name: np.load(value) for name, value in pairs.items() if not value.isdigit()}
    head = ["model", "headrace, ms", "onnxruntime, ms", "times as fast"]
    if args.against:
        head += [f"onnxruntime, {args.against.rpartition('/')[2]}, ms", "times as fast"]
    head += ["apart", "nodes on ours"]
    print(f"| {' | '.join(head)} |")
    print(f"| --- |{' ---: |' * (len(head) - 1)}")
    for path in args.models:
        row = measure(path, args.threads, args.rounds, sizes, given, args.against)
        cells = [row["model"], *(f"{row[k]:.2f}" for k in ("ours_ms", "onnxruntime_ms", "ratio"))]
        if args.against:
            cells += [f"{row[k]:.2f}" for k in ("against_ms", "against")]
        cells += [f"{row['apart']:.1e}", f"{row['nodes_on_ours']} of {row['nodes']}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
