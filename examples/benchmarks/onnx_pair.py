"""Seconds of a call of an ONNX model beside another's, such as a sparse one beside its source.

    python onnx_pair.py SOURCE.onnx OTHER.onnx ... [--threads 2] [--rounds 10]

All take turns, in one process, on the same random inputs. The ratio is the median of the rounds';
`best` is that of the best turns, which is steadier where other work comes and goes.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

import headrace
from headrace.networks.measure import assumed_types, random_input

PAUSE_S, CALLS = 0.02, 8  # of a turn


def timed(function: Any) -> float:
    """Seconds of the best call of a turn."""
    time.sleep(PAUSE_S)
    function()
    taken = []
    for _ in range(CALLS):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("others", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    paths = [args.source, *args.others]
    with ExitStack() as stack:
        networks = [
            stack.enter_context(headrace.load(path, threads=args.threads)) for path in paths
        ]
        random = np.random.default_rng(0)
        types = assumed_types(networks[0], {})
        inputs = {name: random_input(of, random) for name, of in types.items()}
        for network in networks:
            network(inputs)
        taken = np.array(
            [[timed(lambda n=n: n(inputs)) for n in networks] for _ in range(args.rounds)]
        )
    print("| model | ms | times as fast | best |")
    print("| --- | ---: | ---: | ---: |")
    for path, times in zip(paths, taken.T, strict=True):
        ratio, best = np.median(taken[:, 0] / times), taken[:, 0].min() / times.min()
        name = path.rpartition("/")[2]
        print(f"| {name} | {times.min() * 1e3:.2f} | {ratio:.2f} | {best:.2f} |")


if __name__ == "__main__":
    main()
