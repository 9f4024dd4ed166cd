"""A whole stack in less memory: tokens per second with nothing guessed, and with its own drafts.

    python stack_draft.py STACK MEMORY... [--rounds 3] [-n 96]

For each budget, each task of lookup.py runs with nothing guessed, with guesses from the text
(--lookup) and with guesses of the blocks in memory besides (--draft self), in turn; tokens must be
the same. Figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from lookup import TASKS

import headrace
from headrace.sizes import parse_size

WAYS: dict[str, dict[str, Any]] = {
    "off": {"lookup": False},
    "text": {"lookup": True},
    "self": {"draft": "self"},
}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack")
    parser.add_argument("memory", type=parse_size, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-n", "--max-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tasks", nargs="+", help="only these")
    args = parser.parse_args()
    for memory in args.memory:
        with headrace.load(
            args.stack, memory=memory, threads=args.threads, context=1024, whole_stack=True
        ) as model:
            print(
                f"\n{memory / 1e6:.0f} MB: {model.plan.blocks} of {model.plan.blocks_in_file} "
                f"blocks in memory, {model.plan.flash_bytes_per_token / 1e6:.1f} MB a pass\n\n"
                "| task | off, tok/s | text | self | self / off | tokens a pass: text | self |\n"
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
            )
            for name, _, prompt, raw in TASKS:
                if args.tasks and name not in args.tasks:
                    continue
                rates: dict[str, list[float]] = {way: [] for way in WAYS}
                passes: dict[str, float] = {}
                seen = set()
                for _ in range(args.rounds):
                    for way, options in WAYS.items():
                        found = model.generate(
                            prompt, raw=raw, max_tokens=args.max_tokens, **options
                        )
                        found.text()
                        seen.add(tuple(found.ids))
                        stats = found.stats
                        rates[way].append((stats.new_tokens - 1) / max(stats.decode_s, 1e-9))
                        passes[way] = stats.tokens_per_pass or 1.0
                if len(seen) > 1:
                    raise SystemExit(f"{name}: the tokens differ")
                off, text, own = (median(rates[way]) for way in WAYS)
                print(
                    f"| {name} | {off:.2f} | {text:.2f} | {own:.2f} | {own / off:.2f} | "
                    f"{passes['text']:.2f} | {passes['self']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
