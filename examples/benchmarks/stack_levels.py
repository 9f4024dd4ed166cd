"""How good a stack of blocks is: by level, and what each single block changes.

    python stack_levels.py STACK TEXT [--windows 20] [--single 3 5 [--skip 105] [--every 8]]

Perplexity of the first level, the first two and so on; with --single FIRST LAST also after each
block from level FIRST to level LAST, in the order of the file, and the blocks that raise it most,
with the standard error of that change on this text. --skip leaves out the first ones, which were
measured before, and --every 8 measures each eighth only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import headrace
from headrace.model import Model
from headrace.perplexity import log_probabilities, losses_of
from headrace.stack import Stack
from headrace.windows import Windows, cut_text

CONTEXT = 512


class Levels:
    """A stack in memory, of which as many blocks are computed with as one says."""

    def __init__(self, model: Model, text: str, windows: int) -> None:
        self.model = model
        stack = model.prepared.stack
        if stack is None or model.prepared.blocks < len(stack):
            raise SystemExit("the model is no stack, or not all of it fits in memory")
        self.stack: Stack = stack
        self._fixed = sum(model.prepared.parts.values()) - stack.n_bytes(len(stack))
        self._windows: Windows = cut_text(model.tokenizer, text, CONTEXT, windows)

    def losses(self, blocks: int) -> np.ndarray:
        """Of each token that is scored, by the first so many blocks."""
        self.model.memory = self._fixed + self.stack.n_bytes(blocks)
        if self.model.prepared.blocks != blocks:
            raise AssertionError(f"{self.model.prepared.blocks} blocks, not {blocks}")
        found = []
        for ids, targets in self._windows:
            for some, (log_p,) in log_probabilities((self.model,), ids, self._windows.first):
                found.append(losses_of(log_p, targets[some]))
        return np.concatenate(found)


def by_level(levels: Levels) -> None:
    """A row for each level."""
    stack = levels.stack
    beside = levels.model.prepared.read_bytes - stack.n_bytes(len(stack))
    print("| blocks a matrix | bits a weight | weights, MB | perplexity |")
    print("| ---: | ---: | ---: | ---: |")
    for level in range(1, len(stack) // stack.least + 1):
        n_bytes = stack.n_bytes(level * stack.least)
        value = np.exp(levels.losses(level * stack.least).mean())
        bits = 8 * n_bytes / stack.weights
        print(
            f"| {level} | {bits:.2f} | {(beside + n_bytes) / 1e6:.1f} | {value:.3f} |", flush=True
        )


def by_block(levels: Levels, first: int, last: int, skip: int, every: int, each: bool) -> None:
    """What each block between two levels changes, or some: each one in `every` behind `skip`."""
    stack = levels.stack
    begin, end = first * stack.least + skip, last * stack.least
    if not 0 <= skip < end - begin + skip <= len(stack) - first * stack.least:
        raise SystemExit(f"there are no blocks from {begin} to {end}: the stack has {len(stack)}")
    before = levels.losses(begin)
    print(f"\nlevel {first} and {skip} blocks: {np.exp(before.mean()):.3f}", flush=True)
    rows = []
    for i in range(begin, end, every):
        if i > begin and every > 1:
            before = levels.losses(i)
        after = levels.losses(i + 1)
        change = after - before
        error = change.std() / len(change) ** 0.5
        rows.append((float(np.expm1(change.mean())), float(error), stack.blocks[i].info.name))
        before = after
        if each:
            name = stack.blocks[i].info.name
            print(f"{np.exp(before.mean()):.3f} {rows[-1][0]:+.3%}  {name}", flush=True)
        if (i + 1) % stack.least == 0:
            print(f"level {(i + 1) // stack.least}: {np.exp(before.mean()):.3f}", flush=True)
    rows.sort(reverse=True)
    raised = sum(row[0] > 0 for row in rows)
    print(f"{raised} of {len(rows)} blocks raise perplexity on {len(before)} tokens; most of all:")
    for change, error, name in rows[:5]:
        print(f"    {change:+.2%} (+-{error:.2%})  {name}")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=20, help=f"of {CONTEXT} tokens")
    parser.add_argument("--single", type=int, nargs=2, metavar=("FIRST", "LAST"))
    parser.add_argument("--skip", type=int, default=0, help="of single blocks, the first so many")
    parser.add_argument("--every", type=int, default=1, help="measure one in so many")
    parser.add_argument("--each", action="store_true", help="print every single block")
    parser.add_argument("--no-levels", action="store_true", help="only single blocks")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    with headrace.load(args.stack, context=CONTEXT, threads=args.threads) as model:
        levels = Levels(model, args.text.read_text(), args.windows)
        if not args.no_levels:
            by_level(levels)
        if args.single:
            by_block(levels, *args.single, args.skip, args.every, args.each)


if __name__ == "__main__":
    main()
