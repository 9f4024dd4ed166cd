"""What formats and methods of `headrace compress` cost: quality against megabytes.

    python compression.py MODEL --calibrate TEXT --evaluate OTHER_TEXT [--formats q4_0 mxfp4]
                          [--methods rtn search gptq] [--tokens 10240] [--plot out.svg]
                          [--stack STACK --levels 2 4 8] [--rows rows.jsonl]

Each format is compressed to with each method that it has, in a process of its own, and compared
with the source by `headrace compress --evaluate`. STACK, a BitStack file of the same source, is
compared with so many blocks for each matrix as `--levels` says. Prints a table; with --plot also
draws perplexity and KL divergence against the size. Megabytes are those of the whole file, with
embedding and tokenizer (of a stack, up to its last block in use).

With --rows, what is measured is added to that file, and what stands there for the same format and
method is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from quality_plot import Row, draw

from headrace.families import describe
from headrace.loaders.tiled import open_model
from headrace.price import measure_price
from headrace.sparse.gqs import GROUP_FORMATS
from headrace.sparse.group_size import ADAPTIVE
from headrace.sparse.registry import FORMATS
from headrace.stack import stack_of

HEAD = """
| format | method | MB | perplexity | ratio | KL divergence | same top token |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""


def headrace(*arguments: str) -> Row:
    """What a command of headrace prints as JSON."""
    command = [sys.executable, "-m", "headrace", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip()}")
    printed: Row = json.loads(done.stdout)
    return printed


def has_method(name: str, method: str) -> bool:
    """Whether all formats that a matrix may get can be rounded to by a method."""
    if method == "rtn" or name in GROUP_FORMATS:
        return True
    return all(fmt.searched for fmt in ADAPTIVE.get(name) or (FORMATS[name],))


def compressed(args: argparse.Namespace, known: set[tuple[str, str]]) -> Iterator[Row]:
    """A row for each format and method that is not known yet."""
    for name in args.formats:
        for method in args.methods:
            if has_method(name, method) and (name, method) not in known:
                yield one(args, name, method)


def one(args: argparse.Namespace, name: str, method: str) -> Row:
    """Compress to a format by a method, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        options = ["--format", name, "--method", method]
        if method != "rtn":
            options += ["--calibrate", args.calibrate]
            options += ["--calibrate-tokens", str(args.calibrate_tokens)]
        options += ["--evaluate", args.evaluate, "--evaluate-tokens", str(args.tokens)]
        done = headrace("compress", str(args.model), str(Path(folder, "m.gguf")), *options)
    return {"format": name, "method": method, "bytes": done["size_bytes"], **done["price"]}


def blocks(n: int) -> str:
    """What stands for a method in rows of a stack."""
    return f"{n} block{'s' if n > 1 else ''}"


def levels_of(args: argparse.Namespace, known: set[tuple[str, str]]) -> Iterator[Row]:
    """A row for each level of the stack that is not known yet."""
    wanted = [n for n in args.levels if ("bitstack", blocks(n)) not in known]
    if args.stack is None or not wanted:
        return
    model = open_model(args.stack)
    stack = stack_of(model, describe(model))
    if stack is None:
        raise SystemExit(f"{args.stack} is no stack")
    rest = model.size_bytes - stack.n_bytes(len(stack))
    found = measure_price(
        args.model, args.stack, Path(args.evaluate).read_text(), tokens=args.tokens, threads=None,
        memory=None, progress=None, levels=wanted,
    )  # fmt: skip
    for part in found["levels"]:
        n = part.pop("level")
        n_bytes = rest + stack.n_bytes(n * stack.least)
        yield {"format": "bitstack", "method": blocks(n), "bytes": n_bytes, **part}


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"| {row['format']} | {row['method']} | {row['bytes'] / 1e6:.4g} | "
        f"{row['perplexity']:.3f} | {row['perplexity_ratio']:.4f} | "
        f"{row['kl_divergence']:.5f} | {row['top_agreement']:.1%} |"
    )


def all_rows(args: argparse.Namespace, perplexity: float) -> Iterable[Row]:
    """Those that are known, then those that are measured, which are added to the file."""
    lines = args.rows.read_text().splitlines() if args.rows and args.rows.exists() else []
    rows = [json.loads(one) for one in lines]
    known = {(row["format"], row["method"]) for row in rows}
    yield from rows
    for measure in (compressed, levels_of):
        for row in measure(args, known):
            row["perplexity"] = perplexity * row["perplexity_ratio"]
            if args.rows:
                with args.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            yield row


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the source, best in full precision")
    parser.add_argument("--calibrate", required=True, help="a text file")
    parser.add_argument("--evaluate", required=True, help="another text file")
    parser.add_argument("--formats", nargs="*", default=["q8_0", "q5_0", "q4_1", "q4_0"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "search", "gptq"])
    parser.add_argument("--stack", type=Path, help="a BitStack file of the model")
    parser.add_argument("--levels", nargs="+", type=int, default=[2, 3, 4, 6, 8])
    parser.add_argument("--tokens", type=int, default=10240, help="to evaluate on")
    parser.add_argument("--calibrate-tokens", type=int, default=65536)
    parser.add_argument("--folder", help="where to write the files that are measured")
    parser.add_argument("--rows", type=Path, help="a file of rows to begin with, and to add to")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    args = parser.parse_args()
    windows = str(max(1, args.tokens // 512))
    source = headrace("perplexity", str(args.model), args.evaluate, "--chunks", windows)
    said = f"perplexity {source['perplexity']:.3f} +- {source['standard_error']:.3f}"
    print(f"{args.model.name}: {said} over {source['tokens']:,} tokens\n{HEAD}")
    rows = []
    for row in all_rows(args, source["perplexity"]):
        print(line(row), flush=True)
        rows.append(row)
    if args.plot:
        draw(rows, args.plot, f"{args.model.stem}: quality against size")


if __name__ == "__main__":
    main()
