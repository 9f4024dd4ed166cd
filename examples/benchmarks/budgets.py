"""Decode speed of a model against the memory that it may have, beside llama.cpp's and the bound.

    sudo python budgets.py MODEL 500MB 1000MB 2000MB [--peer PYTHON] [--runs 2] [--plot out.svg]

Each measurement runs in a process of its own, in a control group with that limit, caches dropped
first (see memory_limit.py); sides alternate, the best of the runs counts. PYTHON has
llama-cpp-python; its weights are mapped (repacking, its default, is killed where they do not fit).
The bound is the rate of flash, measured in the same run, over the bytes that a token needs and
memory does not have (of experts those that were read and of use). Prints a table; with --plot also
draws it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory_limit import run

from headrace.sizes import format_size, parse_size

HERE = Path(__file__).parent
Row = dict[str, Any]


def ours(model: str, limit: int, n: int) -> Row | None:
    """What `headrace bench` says, in a group that holds it to `limit` bytes."""
    command = [sys.executable, "-m", "headrace", "bench", model, "--memory", str(limit)]
    done = run(limit, [*command, "-p", "16", "-n", str(n), "--runs", "2", "--json"])
    if done["printed"] is None:
        print(f"  headrace at {format_size(limit)}: {done['error']}", file=sys.stderr)
    printed: Row | None = done["printed"]  # type: ignore[assignment]
    return printed


def peer(python: str, model: str, limit: int, n: int) -> float | None:
    """llama.cpp's tokens per second in the same group; None: it was killed."""
    command = [python, str(HERE / "llama_cpp_bench.py"), model, "--no-repack"]
    done = run(limit, [*command, "-p", "0", "-n", str(n), "-r", "2"])
    printed: Any = done["printed"]
    return None if printed is None else float(printed["decode_tok_s"])


def bound(row: Row) -> float | None:
    """Tokens per second if flash never stood still; None where nothing is streamed."""
    if not row["decode_share_of_flash"]:
        return None
    return float(row["decode_tok_s"]) / float(row["decode_share_of_flash"])


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each limit: the best of the runs of both sides."""
    rows = []
    for text in args.limits:
        limit = parse_size(text)
        best: Row | None = None
        theirs: list[float] = []
        for _ in range(args.runs):
            found = ours(args.model, limit, args.tokens)
            if found is not None and (best is None or found["decode_tok_s"] > best["decode_tok_s"]):
                best = found
            if args.peer:
                rate = peer(args.peer, args.model, limit, args.tokens)
                theirs += [] if rate is None else [rate]
        if best is None:
            continue
        rows.append({"limit": limit, "ours": best, "peer": max(theirs, default=None)})
        show(rows[-1])
    return rows


HEAD = (
    "| memory | headrace, tok/s | predicted | bound by flash | share | llama.cpp | "
    "flash, GB/s | read a token | peak resident |\n| --- |" + " ---: |" * 8
)


def show(row: Row) -> None:
    """Print one line of the table."""
    r, limit = row["ours"], bound(row["ours"])
    cells = [
        format_size(row["limit"]),
        f"{r['decode_tok_s']:.2f}",
        f"{r['predicted_tok_s']:.2f}" if r["predicted_tok_s"] else "",
        f"{limit:.2f}" if limit else "",
        f"{r['decode_tok_s'] / limit:.0%}" if limit else "",
        f"{row['peer']:.2f}" if row["peer"] else "",
        f"{r['flash_read_gb_s']:.2f}" if r["flash_read_gb_s"] else "",
        format_size(r["bytes_read_per_token"]),
        format_size(r["peak_rss_bytes"]),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """The table as a picture: a logarithmic scale of tokens per second over memory."""
    import math

    curves = {
        "headrace": ("#1f77b4", [(r["limit"], r["ours"]["decode_tok_s"]) for r in rows]),
        "bound by flash": ("#999999", [(r["limit"], bound(r["ours"])) for r in rows]),
        "llama.cpp, mapped": ("#d62728", [(r["limit"], r["peer"]) for r in rows]),
    }
    points = [(x, y) for _, found in curves.values() for x, y in found if y]
    left, right = 0.0, max(x for x, _ in points) * 1.05
    low = 10 ** math.floor(math.log10(min(y for _, y in points)))
    high = 10 ** math.ceil(math.log10(max(y for _, y in points)))
    width, height, margin = 640, 360, 56

    def at(x: float, y: float) -> tuple[float, float]:
        across = margin + (x - left) / (right - left) * (width - 2 * margin)
        up = math.log10(y / low) / math.log10(high / low)
        return across, height - margin - up * (height - 2 * margin)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2}" y="20" text-anchor="middle" font-size="14">{title}</text>',
    ]
    level = low
    while level <= high:
        for step in (1, 2, 5):
            if level * step > high:
                break
            x, y = at(left, level * step)
            parts.append(
                f'<line x1="{x}" x2="{width - margin}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
                f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{level * step:g}</text>'
            )
        level *= 10
    for gigabytes in range(int(right // 1e9) + 1):
        x, y = at(gigabytes * 1e9, low)
        parts.append(
            f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{gigabytes} GB</text>'
        )
    for i, (name, (colour, found)) in enumerate(curves.items()):
        dots = [at(x, y) for x, y in found if y]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
        parts.append(f'<text x="{margin + 12}" y="{44 + 16 * i}" fill="{colour}">{name}</text>')
    parts.append(
        f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">memory, one limit for '
        "everything</text></svg>"
    )
    path.write_text("\n".join(parts) + "\n")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("limits", nargs="+", help="such as 1000MB")
    parser.add_argument("--peer", help="a Python that has llama-cpp-python")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("-n", "--tokens", type=int, default=8)
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    args = parser.parse_args()
    print(HEAD)
    rows = measure(args)
    if args.plot:
        draw(rows, args.plot, f"{Path(args.model).stem}: tokens per second against memory")


if __name__ == "__main__":
    main()
