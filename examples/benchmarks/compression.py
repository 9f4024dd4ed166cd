"""What formats and methods of `headrace compress` cost: quality against megabytes.

    python compression.py MODEL --calibrate TEXT --evaluate OTHER_TEXT [--formats q4_0 mxfp4]
                          [--methods rtn search gptq] [--tokens 10240] [--plot out.svg]

Each format is compressed to with each method that it has, in a process of its own, and compared
with the source by `headrace compress --evaluate`. Prints a table; with --plot also draws the KL
divergence against the size. Megabytes are those of the whole file, with embedding and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from headrace.sparse.format import Format
from headrace.sparse.group_size import ADAPTIVE
from headrace.sparse.registry import FORMATS

Row = dict[str, Any]
HEAD = """
| format | method | MB | perplexity | ratio | KL divergence | same top token |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""
COLOURS = {"rtn": "#888", "search": "#d80", "gptq": "#06c"}


def headrace(*arguments: str) -> Row:
    """What a command of headrace prints as JSON."""
    command = [sys.executable, "-m", "headrace", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip()}")
    printed: Row = json.loads(done.stdout)
    return printed


def choices_of(name: str) -> tuple[Format, ...]:
    """The formats that a matrix may get."""
    return ADAPTIVE.get(name) or (FORMATS[name],)


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each format and method."""
    windows = str(max(1, args.tokens // 512))
    source = headrace("perplexity", args.model, args.evaluate, "--chunks", windows)
    said = f"perplexity {source['perplexity']:.3f} +- {source['standard_error']:.3f}"
    print(f"{Path(args.model).name}: {said} over {source['tokens']:,} tokens\n{HEAD}")
    rows = []
    for name in args.formats:
        for method in args.methods:
            if method != "rtn" and any(fmt.grid is None for fmt in choices_of(name)):
                continue
            row = one(args, name, method)
            row["perplexity"] = source["perplexity"] * row["perplexity_ratio"]
            print(
                f"| {name} | {method} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.3f} | "
                f"{row['perplexity_ratio']:.4f} | {row['kl_divergence']:.5f} | "
                f"{row['top_agreement']:.1%} |",
                flush=True,
            )
            rows.append(row)
    return rows


def one(args: argparse.Namespace, name: str, method: str) -> Row:
    """Compress to a format by a method, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        options = ["--format", name, "--method", method]
        if method != "rtn":
            options += ["--calibrate", args.calibrate]
            options += ["--calibrate-tokens", str(args.calibrate_tokens)]
        options += ["--evaluate", args.evaluate, "--evaluate-tokens", str(args.tokens)]
        done = headrace("compress", args.model, str(Path(folder, "m.gguf")), *options)
    return {"format": name, "method": method, "bytes": done["size_bytes"], **done["price"]}


def draw(rows: list[Row], path: Path, title: str) -> None:
    """KL divergence, on a logarithmic scale, against megabytes, a dot for each row."""
    rows = [row for row in rows if row["kl_divergence"] > 0]
    width, height, margin = 720, 420, 60
    sizes = [row["bytes"] / 1e6 for row in rows]
    logs = [math.log10(row["kl_divergence"]) for row in rows]
    left, right = min(sizes), max(sizes) + 1e-9
    low, high = math.floor(min(logs)), math.ceil(max(logs))

    def at(size: float, log: float) -> tuple[float, float]:
        x = margin + (size - left) / (right - left) * (width - 2 * margin)
        return x, margin + (high - log) / max(1, high - low) * (height - 2 * margin)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{margin}" y="24" font-size="14">{title}</text>',
    ]
    for power in range(low, high + 1):
        _, y = at(left, power)
        parts.append(f'<path d="M{margin} {y:.1f}H{width - margin}" stroke="#ddd"/>')
        parts.append(f'<text x="{margin - 6}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    for row, size, log in zip(rows, sizes, logs, strict=True):
        x, y = at(size, log)
        colour = COLOURS.get(row["method"], "#333")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        parts.append(
            f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" fill="{colour}">{row["format"]}</text>'
        )
    for i, (method, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{width - 100}" y="{44 + 14 * i}" fill="{colour}">{method}</text>')
    parts.append(f'<text x="{margin}" y="{height - 16}">{left:.0f} MB</text>')
    end = f'<text x="{width - margin}" y="{height - 16}" text-anchor="end">{right:.0f} MB</text>'
    path.write_text("\n".join([*parts, end, "</svg>"]) + "\n")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the source, best in full precision")
    parser.add_argument("--calibrate", required=True, help="a text file")
    parser.add_argument("--evaluate", required=True, help="another text file")
    parser.add_argument("--formats", nargs="+", default=["q8_0", "q5_0", "q4_1", "q4_0"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "search", "gptq"])
    parser.add_argument("--tokens", type=int, default=10240, help="to evaluate on")
    parser.add_argument("--calibrate-tokens", type=int, default=65536)
    parser.add_argument("--folder", help="where to write the files that are measured")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    args = parser.parse_args()
    rows = measure(args)
    if args.plot:
        draw(rows, args.plot, f"{Path(args.model).stem}: KL divergence against size")


if __name__ == "__main__":
    main()
