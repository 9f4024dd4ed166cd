"""A stack of blocks beside rounding to 2 and 3 bits, at equal bytes, as BitStack's paper compares.

    python stack_rivals.py SOURCE STACK --calibrate TEXT --evaluate OTHER_TEXT [--windows 20]

SOURCE is a model in float32 (GGUF), STACK what `headrace compress --format bitstack --calibrate
TEXT` made of it. The matrices of the layers are rounded to asymmetric integers, with a scale for a
row or for 64 inputs, to the nearest (rtn) and by this library's GPTQ with searched scales, and
written back in float32, so that products are not rounded: that flatters them. The same bytes buy
so many blocks of the stack, which are multiplied as they always are. A scale counts 16 bits, a zero
point as many as a weight.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stack_levels import CONTEXT, Levels

import headrace
from headrace.calibration import LayerInputs
from headrace.families import describe
from headrace.loaders.gguf import TensorReader
from headrace.loaders.tiled import open_model
from headrace.perplexity import perplexity
from headrace.placing import PlacedMatrix, place
from headrace.rows import raw_rows
from headrace.sparse.gptq import gptq, inverse_factor
from headrace.sparse.grid import Grid
from headrace.sparse.registry import FORMATS

SHRUNK = 1.0 - 0.05 * np.arange(13)  # ranges that a search tries


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


def rounded(args: argparse.Namespace, path: Path, bits: int, group: int, method: str) -> int:
    """Round the matrices of layers in a copy of the source; gives the bytes they would take."""
    model = open_model(args.source)
    decoder = describe(model)
    placed = {p.matrix.name: p for p in place(model, decoder, "f32")}
    ends = decoder.embedding.name, decoder.head.name
    text = Path(args.calibrate).read_text()
    file = np.memmap(path, np.uint8, "r+")
    total, last, factor = 0, None, None
    with (
        TensorReader() as reader,
        LayerInputs(model, decoder, text, args.calibrate_tokens, args.threads, None) as inputs,
    ):
        for p in placed.values():
            m, info = p.matrix, p.info
            if m.name in ends:
                continue
            if info.type != "F32":
                raise SystemExit(f"{m.name} is {info.type}: the source must be float32")
            w = raw_rows(reader, floats(p), 0, m.rows).view(np.float32)[: m.rows]
            size = group or m.columns
            grid = grid_of(bits, size, method == "gptq")
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
                new = gptq(w, grid, factor, found.importance)
            data = np.ascontiguousarray(new, np.float32).view(np.uint8).reshape(-1)
            file[info.offset : info.offset + info.n_bytes] = data
            total += m.rows * (bits * m.columns + m.columns // size * (16 + bits)) // 8
    file.flush()
    return total


def floats(placed: PlacedMatrix) -> PlacedMatrix:
    """The matrix read as float32."""
    from dataclasses import replace

    return replace(placed, format=FORMATS["f32"])


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("stack", type=Path)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--calibrate-tokens", type=int, default=65536)
    parser.add_argument("--evaluate", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20, help=f"of {CONTEXT} tokens")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    text = args.evaluate.read_text()
    print("| matrices of layers | method | MB | perplexity | stack of the same size |")
    print("| --- | --- | ---: | ---: | ---: |")
    for bits, group in ((2, 0), (2, 64), (3, 0)):
        for method in ("rtn", "gptq"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "m.gguf")
                shutil.copyfile(args.source, path)
                n_bytes = rounded(args, path, bits, group, method)
                with headrace.load(path, context=CONTEXT, threads=args.threads) as model:
                    found = perplexity(model, text, context=CONTEXT, chunks=args.windows)
            if method == "rtn":
                with headrace.load(args.stack, context=CONTEXT, threads=args.threads) as model:
                    levels = Levels(model, text, args.windows)
                    blocks = levels.stack.fitting(n_bytes)
                    own = np.exp(levels.losses(blocks).mean())
            name = f"{bits} bits, a scale for {group or 'a row'}"
            print(
                f"| {name} | {method} | {n_bytes / 1e6:.1f} | {found['perplexity']:.2f} | "
                f"{own:.2f} ({blocks} blocks) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
