"""Compare what keeps and what predicts experts on a recorded text: a table, and a plot if wanted.

python examples/benchmarks/expert_policies.py TEST.routes --learn-from TRAIN.routes --share 0.25

Both are records of `headrace trace`, of different texts. A hit is a use that waits for no read.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from headrace.errors import HeadraceError
from headrace.offload.expert_store import SURE_ENOUGH
from headrace.offload.route_statistics import learn
from headrace.offload.route_trace import read_trace
from headrace.offload.routing_replay import (
    POLICIES,
    PREDICTORS,
    Replay,
    predictor_of,
    replay,
)

_COLOURS = ("#888", "#06c", "#292", "#d80", "#c3c")
_WIDTH, _HEIGHT, _LEFT, _TOP = 860, 360, 50, 50


def draw(rates: dict[tuple[str, str], Replay], predictors: list[str], path: Path) -> None:
    """A group of bars for each policy, a bar for each predictor: hits in percent."""
    group = (_WIDTH - 2 * _LEFT) / len(POLICIES)
    bar, high = group * 0.8 / len(predictors), _HEIGHT - 2 * _TOP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">uses that wait for no read, %</text>',
    ]
    for i, predictor in enumerate(predictors):
        x = _LEFT + 130 * i
        parts.append(f'<text x="{x}" y="38" fill="{_COLOURS[i]}">{predictor}</text>')
    for k, policy in enumerate(POLICIES):
        left = _LEFT + k * group
        parts.append(f'<text x="{left}" y="{_HEIGHT - 25}">{policy}</text>')
        for i, predictor in enumerate(predictors):
            rate = rates[policy, predictor].hit_rate
            x, y = left + i * bar, _TOP + high * (1 - rate)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar * 0.9:.1f}" '
                f'height="{high * rate:.1f}" fill="{_COLOURS[i]}"/>'
                f'<text x="{x:.1f}" y="{y - 2:.1f}" font-size="9">{100 * rate:.0f}</text>'
            )
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="what is replayed")
    parser.add_argument("--learn-from", type=Path, help="a record of another text, for tables")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts that have room")
    parser.add_argument("--slots", type=int, help="experts that have room, instead of a share")
    parser.add_argument("--read-time", type=float, default=0.0, help="in layers that compute")
    parser.add_argument("--sure", type=float, default=SURE_ENOUGH, help="of a rank, to be believed")
    parser.add_argument("--tokens", type=int, help="only so many")
    parser.add_argument("--plot", type=Path, help="an SVG to write")
    args = parser.parse_args()
    for name in ("share", "slots", "tokens"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} is more than 0")
    if args.plot is not None and not args.plot.parent.is_dir():
        parser.error(f"--plot: {args.plot.parent} is not a directory; make it first")
    try:
        compare(args)
    except (HeadraceError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def compare(args: argparse.Namespace) -> None:
    """Replay the text with each policy and predictor, and print a row for each policy.

    Raises:
        HeadraceError, OSError: a record is damaged or missing.
        ValueError: there is room for less than a token takes.
    """
    trace = read_trace(args.trace)
    learned = None
    if args.learn_from is not None:
        other = read_trace(args.learn_from)
        if other.model != trace.model:
            raise SystemExit(f"{args.learn_from} is of another model than {args.trace}")
        learned = learn(other, np.zeros((0, 4)))
    active, count = trace.chosen.shape[2], int(trace.experts.sum())
    slots = args.slots or max(2 * active, round(args.share * count))
    names = [n for n in PREDICTORS if learned is not None or n not in ("pairs", "affinity")]
    print(
        f"{count} experts in {len(trace.experts)} mixtures, {active} for a token; {slots} have "
        f"room; a read takes {args.read_time:g} layers; {args.tokens or len(trace.chosen)} tokens"
    )
    print("hits % (read ahead for nothing, % of what was useful; layers of waiting a token)")
    print("| policy | " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * len(names))
    rates: dict[tuple[str, str], Replay] = {}
    began = time.perf_counter()
    for policy in POLICIES:
        cells = []
        for name in names:
            found = replay(
                trace, slots, policy, predictor_of(name, trace, learned),
                read_time=args.read_time, sure=args.sure, tokens=args.tokens,
            )  # fmt: skip
            rates[policy, name] = found
            n = args.tokens or len(trace.chosen)
            wasted = (found.ahead - found.useful) / max(1, found.useful)
            said = [f"{100 * wasted:.0f}%"] if found.ahead else []
            said += [f"{found.stall / n:.1f}"] if args.read_time else []
            cells.append(f"{100 * found.hit_rate:.1f}" + (f" ({'; '.join(said)})" if said else ""))
        print(f"| {policy} | " + " | ".join(cells) + " |", flush=True)
    if args.plot is not None:
        draw(rates, names, args.plot)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
