"""Stacks of blocks beside rounding to 2 and 3 bits, at equal bytes, as BitStack's paper compares.

    python stack_rivals.py SOURCE STACK... --calibrate TEXT --evaluate OTHER_TEXT [--windows 20]

SOURCE is a model in float32 (GGUF), each STACK what `headrace compress --format bitstack
--calibrate TEXT` made of it. The matrices of the layers are rounded to asymmetric integers, with a
scale for a row or for 64 inputs, and written back in float32, so that products are not rounded:
that flatters them. Ways to round: to the nearest (rtn); GPTQ with scales and zero points from the
least and the largest weight of each row or group, as in the paper's comparison (gptq-range); and
GPTQ with searched scales (gptq). The same bytes buy so many blocks of a stack, which are multiplied
as they always are. A scale counts 16 bits, a zero point as many as a weight.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from stack_levels import CONTEXT, Levels

import headrace
from headrace.calibration import LayerInputs
from headrace.families import describe
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.tiled import open_model
from headrace.perplexity import perplexity
from headrace.placing import PlacedMatrix, dense, place
from headrace.rows import raw_rows
from headrace.sparse.gptq import gptq, inverse_factor
from headrace.sparse.grid import Grid
from headrace.sparse.registry import FORMATS

SHRUNK = 1.0 - 0.05 * np.arange(13)  # ranges that a search tries
METHODS = "rtn", "gptq-range", "gptq"
SIZES = (2, 0), (2, 64), (3, 0)  # bits, inputs that share a scale (0: a row)


def grid_of(bits: int, group: int, search: bool) -> Grid:
    """Asymmetric integers; "raw bytes" are scales and offsets, and at last the weights."""
    top = (1 << bits) - 1

    def fit(x: np.ndarray, importance: np.ndarray | None) -> Any:
        parts = x.reshape(len(x), -1, group)
        weight = np.ones(x.shape[1]) if importance is None else importance
        weight = weight.reshape(-1, group)
        least = np.minimum(parts.min(axis=2), 0)
        most = np.maximum(parts.max(axis=2), 0)
        best = np.full(least.shape, np.inf)
        found = np.zeros((2, *least.shape), np.float32)
        for shrunk in SHRUNK if search else SHRUNK[:1]:
            scale = np.maximum((most - least) * shrunk / top, 1e-12).astype(np.float16)
            scale = np.maximum(scale.astype(np.float32), 1e-7)
            zero = np.rint(-least * shrunk / scale).clip(0, top)
            offset = -zero * scale
            codes = np.rint((parts - offset[..., None]) / scale[..., None]).clip(0, top)
            off = codes * scale[..., None] + offset[..., None] - parts
            error = (off**2 * weight).sum(axis=2)
            better = error < best
            best = np.where(better, error, best)
            found[0] = np.where(better, scale, found[0])
            found[1] = np.where(better, offset, found[1])
        return found

    def put(raw: Any, codes: np.ndarray) -> Any:
        parts = codes.reshape(len(codes), -1, group).astype(np.float32)
        return (parts * raw[0][..., None] + raw[1][..., None]).reshape(codes.shape)

    levels = tuple(float(code) for code in range(top + 1))
    return Grid(group=group, levels=levels, fit=fit, scales=lambda raw: (raw[0], raw[1]), put=put)


def layer_matrices(source: Path) -> tuple[ModelFile, Decoder, list[PlacedMatrix]]:
    """The matrices of a model's layers, in the order of a pass."""
    model = open_model(source)
    decoder = describe(model)
    ends = decoder.embedding.name, decoder.head.name
    found = [dense(p) for p in place(model, decoder, "f32") if p.matrix.name not in ends]
    for p in found:
        if p.info.type != "F32":
            raise SystemExit(f"{p.matrix.name} is {p.info.type}: the source must be float32")
    return model, decoder, found


def rounded_bytes(source: Path, bits: int, group: int) -> int:
    """What the matrices would take."""
    return sum(
        m.rows * (bits * m.columns + m.columns // (group or m.columns) * (16 + bits)) // 8
        for m in (p.matrix for p in layer_matrices(source)[2])
    )


def put_rounded(args: argparse.Namespace, path: Path, bits: int, group: int, method: str) -> None:
    """Round the matrices of layers in a copy of the source."""
    model, decoder, placed = layer_matrices(args.source)
    text = Path(args.calibrate).read_text()
    file = np.memmap(path, np.uint8, "r+")
    last, factor = None, None
    with (
        TensorReader() as reader,
        LayerInputs(model, decoder, text, args.calibrate_tokens, args.threads, None) as inputs,
    ):
        for p in placed:
            m, info = p.matrix, p.info
            w = raw_rows(reader, floats(p), 0, m.rows).view(np.float32)[: m.rows]
            grid = grid_of(bits, group or m.columns, method == "gptq")
            if method == "rtn":
                new = grid.round(w, grid.fit(w, None))
            else:
                found = inputs.of(m.name)
                if found is None:
                    raise AssertionError(m.name)
                if last is not found.h:
                    last, factor = found.h, inverse_factor(found.h)
                if factor is None:
                    raise AssertionError
                new = gptq(w, grid, factor, grid.fit(w, found.importance))
            data = np.ascontiguousarray(new, np.float32).view(np.uint8).reshape(-1)
            file[info.offset : info.offset + info.n_bytes] = data
    file.flush()


def floats(placed: PlacedMatrix) -> PlacedMatrix:
    """The matrix read as float32."""
    return replace(placed, format=FORMATS["f32"])


def in_bytes(path: Path, n_bytes: int, text: str, args: argparse.Namespace) -> str:
    """Perplexity of as much of a stack as has room."""
    with headrace.load(path, context=CONTEXT, threads=args.threads) as model:
        levels = Levels(model, text, args.windows)
        blocks = levels.stack.fitting(n_bytes)
        own = np.exp(levels.losses(blocks).mean())
    return f"{own:,.1f} ({blocks / levels.stack.least:.2f} levels)"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("stacks", type=Path, nargs="+", metavar="stack")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--calibrate-tokens", type=int, default=65536)
    parser.add_argument("--evaluate", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[], help="more for stacks")
    parser.add_argument("--windows", type=int, default=20, help=f"of {CONTEXT} tokens")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    text = args.evaluate.read_text()
    columns = "matrices of layers", "MB", *args.methods, *(path.stem for path in args.stacks)
    print(f"| {' | '.join(columns)} |\n| --- | {' | '.join(['---:'] * (len(columns) - 1))} |")
    for bits, group in SIZES:
        cells = [f"{bits} bits, a scale for {f'{group} inputs' if group else 'a row'}"]
        n_bytes = rounded_bytes(args.source, bits, group)
        cells.append(f"{n_bytes / 1e6:.1f}")
        for method in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "m.gguf")
                shutil.copyfile(args.source, path)
                put_rounded(args, path, bits, group, method)
                with headrace.load(path, context=CONTEXT, threads=args.threads) as model:
                    found = perplexity(model, text, context=CONTEXT, chunks=args.windows)
            cells.append(f"{found['perplexity']:,.1f}")
        cells += [in_bytes(path, n_bytes, text, args) for path in args.stacks]
        print(f"| {' | '.join(cells)} |", flush=True)
    for size in args.megabytes:
        cells = ["", f"{size:.1f}", *("" for _ in args.methods)]
        cells += [in_bytes(path, int(size * 1e6), text, args) for path in args.stacks]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
