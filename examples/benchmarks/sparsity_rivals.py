"""What leaving out weights costs: groups, 2:4, 16 of 32, single weights, and 2 bits for all.

    python examples/benchmarks/sparsity_rivals.py MODEL-f16.gguf --calibrate TEXT --evaluate OTHER
                                                  [--sparsity 0.5] [--chunks 8] [--folder /tmp]

Prints the perplexity of the source, of what `headrace compress` makes of it (groups; 2:4, 16
or 8 of 32, by size and fitted), and of rivals, which have no format: their weights are rounded as
they would be, and written as float16 into a copy of the source, whose matrices have to be F16. Of
their bits, positions count as little as they can, a bit a weight if any may be left out. "fitted"
is with the same conjugate gradients as group sparsity; else the smallest weights go.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headrace.calibration import LayerInputs
from headrace.families import describe
from headrace.loaders.tiled import open_model
from headrace.rounding import Inputs
from headrace.sparse import gqs
from headrace.sparse.gptq import gptq, inverse_factor
from headrace.sparse.gqs_pruning import Hessian, refit
from headrace.sparse.pattern import loss, stays
from headrace.sparse.registry import FORMATS
from headrace.team import default_threads

RIVALS = ("2 bits, groups of 128", "single weights, by size", "single weights, fitted")
PATTERNS = {name: fmt for name, fmt in FORMATS.items() if fmt.pattern is not None}


def headrace(*arguments: str) -> dict[str, Any]:
    """What a command of headrace prints as JSON."""
    command = [sys.executable, "-m", "headrace", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip()}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def in_2_bits(w: np.ndarray) -> np.ndarray:
    """To nearest, with the range of each 128 weights of a row."""
    out = np.empty_like(w)
    for at in range(0, w.shape[1], 128):
        x = w[:, at : at + 128]
        low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        step = np.where(high > low, (high - low) / 3, 1)
        zero = np.rint(-low / step)
        out[:, at : at + 128] = (np.clip(np.rint(x / step) + zero, 0, 3) - zero) * step
    return out


def single(w: np.ndarray, inputs: Inputs, rate: float, fitted: bool) -> np.ndarray:
    """A share of the weights of each row left out, the others in `i4_g32`."""
    fmt, n = FORMATS["i4_g32"], w.shape[1]
    grid, left = fmt.grid, round(w.shape[1] * (1 - rate))
    assert grid is not None
    if not fitted:
        w = np.where(stays(np.abs(w), left, n), w, np.float32(0))
        return fmt.decode(grid.round(w, grid.fit(w, None)))
    hessian = Hessian(inputs.h, inverse_factor(inputs.h))
    stay = stays(loss(w, hessian), left, n)
    best = refit(w, stay, hessian.h)
    return fmt.decode(gptq(best, grid, hessian.upper, grid.fit(best, inputs.importance), stay))


def write(rival: str, source: Path, to: Path, inputs: LayerInputs, rate: float) -> float:
    """Write a rival; bits of each of its weights."""
    shutil.copy(source, to)
    model = open_model(source)
    decoder = describe(model)
    with to.open("r+b") as file:
        for matrix in decoder.matrices():
            found = inputs.of(matrix.name)
            if found is None:
                continue  # embedding and head
            info = model.tensors[matrix.name]
            w = model.read(info).view(np.float16).astype(np.float32).reshape(info.shape)
            w = in_2_bits(w) if rival == RIVALS[0] else single(w, found, rate, rival == RIVALS[2])
            file.seek(info.offset)
            file.write(w.astype(np.float16).tobytes())
    return 2.25 if rival == RIVALS[0] else 1 + 4 * (1 - rate) + 0.5


def models(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, float, Path]]:
    """Name, bits of each weight of layers, file."""
    yield "the source", 16.0, args.model
    path = folder / "m.gguf"
    fit = ("--calibrate", str(args.calibrate), "--calibrate-tokens", str(args.calibrate_tokens))
    compress = ("compress", str(args.model), str(path), "--force", "--format")
    for name, fmt in gqs.GROUP_FORMATS.items():
        headrace(*compress, name, "--sparsity", str(args.sparsity), *fit)
        yield f"{name}", (1 - args.sparsity) * fmt.unit_bytes * 8 / gqs.UNIT, path
    for name, pattern in PATTERNS.items():
        for how, options in (("by size", ()), ("fitted", fit)):
            headrace(*compress, name, *options)
            yield f"{name}, {how}", pattern.bits_per_weight, path
    model = open_model(args.model)
    text = args.calibrate.read_text("utf-8")
    threads, decoder = default_threads(), describe(model)
    for rival in RIVALS:
        of = LayerInputs(model, decoder, text, args.calibrate_tokens, threads, None)
        with of as inputs:
            bits = write(rival, args.model, path, inputs, args.sparsity)
        yield rival, bits, path


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file whose matrices are F16")
    parser.add_argument("--calibrate", type=Path, required=True, help="a text file")
    parser.add_argument("--calibrate-tokens", type=int, default=65536)
    parser.add_argument("--evaluate", type=Path, required=True, help="another text file")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of groups and single weights")
    parser.add_argument("--chunks", type=int, default=20, help="windows of 512 tokens to evaluate")
    parser.add_argument("--folder", help="where to write the files that are measured")
    args = parser.parse_args()
    print("| weights of layers | bits | perplexity |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, bits, path in models(args, Path(folder)):
            found = headrace(
                "perplexity", str(path), str(args.evaluate), "--chunks", str(args.chunks)
            )
            said = f"{found['perplexity']:,.1f} ± {found['standard_error']:,.1f}"
            print(f"| {name} | {bits:.2f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
