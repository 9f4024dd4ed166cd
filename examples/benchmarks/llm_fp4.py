"""LLM-FP4: 4-bit floats for weights and activations, computed exactly, beside what runs fast.

    python examples/benchmarks/llm_fp4.py MODEL --text TEXT [--layers 0 8] [--tokens 128]

For each matrix of some layers, splits and biases are searched on tokens of the text
(`headrace.sparse.llm_fp4`), and the matrix is multiplied by what it reads of as many others. Prints
the split that was chosen for the weights, and by how many dB outputs are above what they are off:
    W4A4            searched as in the paper
    W4A4, fitted    biases with which the largest weight and input fit, not searched, E2M1
    W4A4, integers  both to 15 levels, with a scale for a row, and one for all inputs of a token
    W4A8            `--format llm_fp4`: scales for 128 weights, 8-bit activations for 32 inputs;
                    not where rows are no multiple of 128
Dense models only. A matrix of SmolLM2 takes a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from headrace.calibration_pass import CalibrationPass, Read, Unit, units_of
from headrace.families import describe
from headrace.families.decoder import Matrix
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import open_model
from headrace.rows import float_matrix
from headrace.sparse import llm_fp4
from headrace.sparse.group_size import ADAPTIVE, choose_format
from headrace.team import default_threads
from headrace.tokenizer import Tokenizer
from headrace.windows import cut_text

NAMES = "W4A4", "W4A4, fitted", "W4A4, integers", "W4A8"


class Seen:
    """What matrices read of each window, by their place among a layer's readers: [tokens, n]."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[int, int], np.ndarray] = {}

    def see(self, window: int, stop: int, read: Read) -> None:
        """Keep it."""
        self.inputs[window, stop] = read().T.copy()


def to_levels(x: np.ndarray, most: int) -> np.ndarray:
    """The nearest of 2 `most` + 1 integers, times a scale for each row."""
    step = np.abs(x).max(axis=-1, keepdims=True) / most
    return np.rint(x / np.where(step > 0, step, 1)) * step


def products(
    w: np.ndarray, searched: np.ndarray, x: np.ndarray
) -> tuple[str, list[np.ndarray | None]]:
    """The split that was chosen for the weights, and x W^T in each of the ways."""
    choice = llm_fp4.search(w, searched)
    fast = None
    if w.shape[1] % llm_fp4.GROUP == 0:
        fmt = choose_format(w, ADAPTIVE["llm_fp4"])
        x8 = to_levels(x.reshape(len(x), -1, 32), 127).reshape(x.shape)
        fast = x8 @ fmt.decode(fmt.encode(w)).T
    ways = [
        llm_fp4.multiply(choice, w, x),
        llm_fp4.multiply(llm_fp4.start(w, searched), w, x),
        to_levels(x, 7) @ to_levels(w, 7).T,
        fast,
    ]
    return choice.weight, ways


def decibels(exact: np.ndarray, found: np.ndarray) -> float:
    """How far the exact result is above what another is off."""
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


def main() -> None:
    """Parse the command line, bring the text through the model, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="*", help="default: all")
    parser.add_argument("--tokens", type=int, default=128, help="to search on, and to compare on")
    args = parser.parse_args()
    model = open_model(args.model)
    decoder = describe(model)
    if decoder.mixtures():
        raise SystemExit(f"{args.model} is a mixture of experts; take a dense model")
    tokenizer = Tokenizer.from_metadata(model.metadata, model.paths[0])
    ids = cut_text(tokenizer, args.text.read_text("utf-8"), args.tokens, 2).ids
    if len(ids) < 2:
        raise SystemExit(f"{args.text} has fewer than {2 * args.tokens} tokens")
    print("| matrix | split |", " | ".join(NAMES), "|")
    print("| --- | --- |", " | ".join("---:" for _ in NAMES), "|")
    with tempfile.TemporaryDirectory() as folder, TensorReader() as reader:
        text = CalibrationPass(model, decoder, ids, default_threads(), None, Path(folder))
        try:
            for unit in units_of(decoder):
                seen = Seen()
                text.run(unit, 0, seen.see, lambda share: None, None)
                if not args.layers or unit.index in args.layers:
                    show(unit, seen, lambda m: float_matrix(model, reader, m)[0])
        finally:
            text.close()


def show(unit: Unit, seen: Seen, weights: Callable[[Matrix], np.ndarray]) -> None:
    """A line for each matrix of a layer."""
    for stop, matrices in enumerate(unit.readers):
        for matrix in matrices:
            w, x = weights(matrix), seen.inputs[1, stop]
            split, ways = products(w, seen.inputs[0, stop], x)
            exact = x.astype(np.float64) @ w.T.astype(np.float64)
            cells = ["" if way is None else f"{decibels(exact, way):.1f}" for way in ways]
            print(f"| {matrix.name} | {split} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
