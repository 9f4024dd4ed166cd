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
from typing import Any, NamedTuple

import numpy as np

from headrace.calibration import LayerInputs
from headrace.families import describe
from headrace.loaders.tiled import open_model
from headrace.sparse import gqs
from headrace.sparse.gptq import inverse_factor
from headrace.sparse.gqs_pruning import Hessian, refit
from headrace.sparse.pattern import loss, stays
from headrace.sparse.registry import FORMATS
from headrace.team import default_threads


class Rival(NamedTuple):
    """How weights are left out and rounded: `single`: a share of those of each row; else none."""

    name: str
    single: bool
    fitted: bool
    bits: int
    group: int


RIVALS = (
    Rival("2 bits, groups of 128", False, False, 2, 128),
    Rival("single weights, 4 bits", True, False, 4, 32),
    Rival("single weights fitted, 4 bits", True, True, 4, 32),
)
PATTERNS = {name: fmt for name, fmt in FORMATS.items() if fmt.pattern is not None}


def headrace(*arguments: str) -> dict[str, Any]:
    """What a command of headrace prints as JSON."""
    command = [sys.executable, "-m", "headrace", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip()}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def rounded(w: np.ndarray, stay: np.ndarray, bits: int, group: int) -> np.ndarray:
    """To nearest, with the range of what stays in each group of a row; the rest is zero."""
    most, out = 2**bits - 1, np.zeros_like(w)
    for at in range(0, w.shape[1], group):
        x, keep = w[:, at : at + group], stay[:, at : at + group]
        low = np.where(keep, x, np.inf).min(axis=1, keepdims=True)
        high = np.where(keep, x, -np.inf).max(axis=1, keepdims=True)
        step = np.where(high > low, (high - low) / most, 1)
        zero = np.where(np.isfinite(low), np.rint(-low / step), 0)
        codes = np.clip(np.rint(x / step) + zero, 0, most)
        out[:, at : at + group] = np.where(keep, (codes - zero) * step, 0)
    return out


def write(rival: Rival, source: Path, to: Path, inputs: LayerInputs, rate: float) -> float:
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
            n, stay = w.shape[1], np.ones(w.shape, bool)
            if rival.single:
                hessian = Hessian(found.h, inverse_factor(found.h))
                size = loss(w, hessian) if rival.fitted else np.abs(w)
                stay = stays(size, round(n * (1 - rate)), n)
                if rival.fitted:
                    w = refit(w, stay, hessian.h)
            file.seek(info.offset)
            file.write(rounded(w, stay, rival.bits, rival.group).astype(np.float16).tobytes())
    return rival.bits + 32 / rival.group - (rival.bits * rate - 1 if rival.single else 0)


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
        yield rival.name, bits, path


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
