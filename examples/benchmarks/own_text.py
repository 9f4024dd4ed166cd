"""Text that a model writes itself, for models whose own kind of text is not at hand.

    python own_text.py MODEL OUT [--pieces 160] [--seed 1] [--prompt "Once upon a time"]

Each piece continues the prompt at temperature 1, with a seed of its own, up to --tokens tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import headrace


def main() -> None:
    """Parse the command line, write the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pieces", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=480, help="of a piece, at most")
    parser.add_argument("--seed", type=int, default=1, help="of the first piece")
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()
    with headrace.load(args.model) as model, args.out.open("w") as file:
        for seed in range(args.seed, args.seed + args.pieces):
            found = model.generate(
                args.prompt, max_tokens=args.tokens, temperature=1.0, top_k=0, seed=seed, raw=True
            )
            file.write(args.prompt + found.text() + "\n\n")


if __name__ == "__main__":
    main()
