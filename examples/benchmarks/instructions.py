"""Instructions per token of whole models on an emulated CPU: a measure that no noise moves.

python examples/benchmarks/instructions.py MODEL [--target aarch64-dotprod]
    [--machine "qemu-... -cpu ..."] [--peer "llama.cpp=./llama_tokens MODEL {ids} {n}"]

MODEL is exported as a static executable and run in QEMU with a counting plugin, for few tokens and
for some more: the difference is what a token of decode takes. A peer is any static executable that
does the same with {ids} and {n} (see llama_tokens.cpp).
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path

from headrace.loaders.sources import resolve
from headrace.standalone.export import export
from headrace.targets.emulation.count import count_program
from headrace.targets.target import all_targets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--target", default="aarch64-dotprod")
    parser.add_argument("--machine", help="default: the weakest one that the target is for")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--ids", default="504,3575,282,4649,314")
    parser.add_argument("-n", type=int, nargs=2, default=(2, 10), metavar=("FEW", "MORE"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    target = all_targets()[options.target]
    machine = options.machine or target.machines[0]
    few, more = options.n
    with tempfile.TemporaryDirectory(prefix="headrace-count-") as folder:
        program = Path(folder, "program")
        export(resolve(options.model), target, program, context=512)
        sides = {"headrace": f"{program} --ids {{ids}} -n {{n}} --print-ids"}
        sides |= dict(peer.split("=", 1) for peer in options.peer)
        rows = {}
        for name, command in sides.items():
            runs = [
                count_program(machine, shlex.split(command.format(ids=options.ids, n=n)))
                for n in (few, more)
            ]
            rows[name] = {
                "instructions_per_token": (runs[1][0] - runs[0][0]) / (more - few),
                "tokens": runs[1][1],
            }
    ours = rows["headrace"]["instructions_per_token"]
    print(f"| {machine} | M instructions a token | headrace / it | same tokens |")
    print("| --- | ---: | ---: | --- |")
    for name, row in rows.items():
        took = row["instructions_per_token"]
        same = "yes" if row["tokens"] == rows["headrace"]["tokens"] else "no"
        print(f"| {name} | {took / 1e6:.2f} | {ours / took:.3f} | {same} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
