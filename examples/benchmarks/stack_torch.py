"""Decoding with a stack of blocks, and PyTorch that rebuilds each matrix to multiply by it.

    python stack_torch.py MODEL --torch PYTHON [--blocks 2 4] [--rank 16] [--dtypes bfloat16]

MODEL is any GGUF file of the shape; its weights do not matter: a stack of zeros of its shape is
written as a file with holes. PYTHON is an interpreter that has PyTorch, and needs nothing else. The
other side is the CPU path of BitStack's authors: signs are unpacked, the magnitude is U V, their
products are added up, and one product by the matrix follows, in float32 and bfloat16. It is timed
on one layer and counted for all, without attention, norms and head, which our figure has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DTYPES = "float32", "bfloat16"


def torch_side(job: dict) -> None:
    """Seconds of a layer: best of several, printed as JSON. Runs in an interpreter with PyTorch."""
    import torch

    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    shifts = torch.arange(8, dtype=torch.uint8)

    def matrix(rows: int, columns: int) -> list:
        return [
            (
                torch.randint(0, 256, (rows * columns // 8,), dtype=torch.uint8),
                torch.randn(rows, job["rank"]).to(dtype),
                torch.randn(job["rank"], columns).to(dtype),
            )
            for _ in range(job["blocks"])
        ]

    layer = [(rows, columns, matrix(rows, columns)) for rows, columns in job["matrices"]]

    def token() -> None:
        for rows, columns, blocks in layer:
            x = torch.ones(1, columns, dtype=dtype)
            total = None
            for bits, u, v in blocks:
                signs = ((bits[:, None] >> shifts) & 1).to(dtype).mul_(2).sub_(1)
                part = (u @ v).mul_(signs.view(rows, columns))
                total = part if total is None else total.add_(part)
            x @ total.T

    best = float("inf")
    with torch.inference_mode():
        token()
        for _ in range(job["runs"]):
            began = time.perf_counter()
            token()
            best = min(best, time.perf_counter() - began)
    print(json.dumps(best))


def stack_of_zeros(source: Path, path: Path, rank: int, levels: int) -> None:
    """A stack of the shape of a model, in a file with holes."""
    from headrace.families import describe
    from headrace.loaders.tiled import Entry, build_header, format_name, open_model, tiled_type
    from headrace.placing import place
    from headrace.sparse.bitstack import BlockShape
    from headrace.sparse.registry import FORMATS
    from headrace.stack import block_format, block_name

    model = open_model(source)
    decoder = describe(model)
    ends = decoder.embedding.name, decoder.head.name
    entries, blocks = [], []
    for p in place(model, decoder, "q8"):
        m = p.matrix
        if m.name in ends:
            n_bytes = FORMATS["q8_0"].tiled_bytes(m.rows, m.columns)
            shape = (m.rows, m.columns)
            entries.append(Entry(m.name, tiled_type("q8_0"), shape, n_bytes, "q8_0"))
        else:
            blocks.append(m)
    for info in model.tensors.values():
        if len(info.shape) == 1:
            kind = format_name(info.type)
            entries.append(Entry(info.name, info.type, info.shape, info.n_bytes, kind))
    for level in range(levels):
        for m in blocks:
            kind = block_format(rank)
            n_bytes = BlockShape(m.rows, m.columns, rank).n_bytes
            name, shape = block_name(m.name, level), (m.rows, m.columns)
            entries.append(Entry(name, tiled_type(kind), shape, n_bytes, kind))
    header, _, size = build_header(model, entries)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)


def our_side(path: Path, threads: int, tokens: int) -> float:
    """Tokens per second."""
    import headrace

    with headrace.load(path, context=256, threads=threads) as model:
        best = float("inf")
        for _ in range(3):
            model.forget()
            model.read_tokens([1])
            began = time.perf_counter()
            for i in range(tokens):
                model.read_tokens([1], i + 1)
            best = min(best, (time.perf_counter() - began) / tokens)
    return 1 / best


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--torch", required=True, help="an interpreter with PyTorch")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    from headrace.families import describe
    from headrace.loaders.tiled import open_model

    decoder = describe(open_model(args.model))
    a, f = decoder.layers[0].attention, decoder.layers[0].feed_forward
    matrices = [(m.rows, m.columns) for m in (a.query, a.key, a.value, a.output, f.gate, f.up,
                                              f.down)]  # fmt: skip
    columns = "blocks a matrix", "headrace, tok/s", *(f"PyTorch {one}" for one in args.dtypes)
    print(f"| {' | '.join(columns)} | ratio to the best |")
    print("| ---: " * (len(columns) + 1) + "|")
    for blocks in args.blocks:
        best = dict.fromkeys(("ours", *args.dtypes), 0.0)
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "stack.gguf")
                stack_of_zeros(args.model, path, args.rank, blocks)
                best["ours"] = max(best["ours"], our_side(path, args.threads, args.tokens))
            for dtype in args.dtypes:
                job = {"threads": args.threads, "dtype": dtype, "rank": args.rank, "runs": 3,
                       "blocks": blocks, "matrices": matrices}  # fmt: skip
                command = [args.torch, __file__, "--side", json.dumps(job)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rate = 1 / (json.loads(done.stdout) * len(decoder.layers))
                best[dtype] = max(best[dtype], rate)
        ours, *others = best.values()
        cells = [str(blocks), f"{ours:.2f}", *(f"{other:.3f}" for other in others)]
        print(f"| {' | '.join(cells)} | {ours / max(others):.1f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        torch_side(json.loads(sys.argv[2]))
    else:
        main()
