"""Inputs to calibrate an encoder with (`headrace compress --calibrate OUT`), out of plain text.

    python encoder_inputs.py DIRECTORY TEXT.txt OUT [--tokens 128] [--count 256]

DIRECTORY has the encoder's tokenizer.json. The text is cut into pieces of so many tokens, each
between the tokens that the tokenizer puts around a text; OUT gets an .npz file of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--count", type=int, default=256)
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    around = tokenizer.encode("").ids
    inside = given.tokens - len(around)
    if inside < 1:
        parser.error(f"--tokens is more than the {len(around)} around a text")
    ids = tokenizer.encode(given.text.read_text("utf-8"), add_special_tokens=False).ids
    count = min(given.count, len(ids) // inside)
    if count < 1:
        parser.error(f"{given.text} has {len(ids)} tokens, and a piece takes {inside}")
    given.out.mkdir(exist_ok=True)
    for i in range(count):
        piece = [*around[:1], *ids[i * inside : (i + 1) * inside], *around[1:]]
        tokens = np.array([piece], np.int64)
        np.savez(
            given.out / f"{i:04}.npz", input_ids=tokens, attention_mask=np.ones_like(tokens),
            token_type_ids=np.zeros_like(tokens),
        )  # fmt: skip
    print(f"{count} pieces of {given.tokens} tokens")


if __name__ == "__main__":
    main()
