"""From the start of the process to the first token, and what each part of it costs.

    python examples/benchmarks/startup.py [MODEL] [--peer PYTHON] [--runs 7] [--json out.json]

Every run is a fresh process with warm caches (the file in the page cache, kernels compiled): wall
time from its start until the first token comes through the pipe, and its peak resident memory. The
best of all runs counts. The parts are those of the fastest of some more runs, timed inside.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "The sky is blue because"  # five tokens of SmolLM2

PEAK = (
    "def peak():\n"
    "    with open('/proc/self/status') as status:\n"
    "        return next(int(s.split()[1]) * 1024 for s in status if s.startswith('VmHWM'))\n"
)

RUN = (
    "import sys\n"
    "from headrace.cli import main\n"
    "code = main(sys.argv[1:])\n"
    "from headrace.peak import peak_rss_bytes\n"
    "print(peak_rss_bytes(), file=sys.stderr)\n"
    "sys.exit(code)\n"
)

RUN_LLAMA = PEAK + (
    "import sys\n"
    "from llama_cpp import Llama\n"
    "model = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[3]), verbose=False)\n"
    "pieces = model.create_completion(sys.argv[2], max_tokens=1, temperature=0, stream=True)\n"
    "print(next(iter(pieces))['choices'][0]['text'] or ' ', flush=True)\n"
    "print(peak(), file=sys.stderr)\n"
)

# The parts are timed where the runtime does them, by wrapping its own functions; what is left of
# `load` and of the first token is "rest".
PARTS = """
import sys, time
entered = time.monotonic()
marks = {}
def lap(name, since):
    now = time.monotonic()
    marks[name] = marks.get(name, 0.0) + now - since
    return now
at = entered
import numpy
at = lap("import numpy", at)
import llvmlite.binding
at = lap("import llvmlite", at)
import headrace.model
at = lap("import headrace", at)
from headrace import model, programs, team, tokenizer, weights
from headrace.targets import cache
def wrap(owner, attribute, name):
    inner = owner.__dict__[attribute]
    function = inner.__func__ if isinstance(inner, classmethod) else inner
    def timed(*args, **kwargs):
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            lap(name, began)
    setattr(owner, attribute, classmethod(timed) if isinstance(inner, classmethod) else timed)
wrap(model, "resolve", "find the file")
wrap(model, "prepare", "header and plan")
wrap(cache.KernelStore, "load", "load kernels")
wrap(weights.Weights, "__init__", "weights")
wrap(weights.Weights, "load", "weights")
wrap(programs.Programs, "__init__", "programs")
wrap(team.Team, "__init__", "threads")
wrap(tokenizer.Tokenizer, "from_metadata", "tokenizer")
wrap(tokenizer.Tokenizer, "encode", "encode the prompt")
wrap(model.Model, "_read", "prefill")
options = {"threads": int(sys.argv[3])}
if len(sys.argv) > 4:
    options["target"] = sys.argv[4]
began = time.monotonic()
with model.load(sys.argv[1], **options) as loaded:
    list(loaded.generate(sys.argv[2], max_tokens=1, raw=True))
    done = time.monotonic()
    marks["rest"] = done - began - sum(v for k, v in marks.items() if "import" not in k)
    import json
    print(json.dumps({"entered": entered, "done": done, "parts": marks}))
"""


def first_token(command: list[str]) -> tuple[float, int]:
    """(seconds until the first output, peak bytes) of a fresh process."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        os.read(child.stdout.fileno(), 1)
        seconds = time.monotonic() - began
        _, errors = child.communicate()
    lines = errors.decode(errors="replace").strip().splitlines()
    if child.returncode or not lines:
        raise SystemExit("\n".join(["a run failed:", *lines[-5:]]))
    return seconds, int(lines[-1])


def parts_of(command: list[str]) -> dict[str, float]:
    """Seconds of each part of a fresh process, in the order in which they happen."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("\n".join(["a run failed:", *done.stderr.strip().splitlines()[-5:]]))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    # The monotonic clock is the system's, the same in every process (on Linux, macOS, Windows).
    return {"start of Python": found["entered"] - began, **found["parts"]}


def measure(model: str, peers: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Best times and smallest peaks of each side, alternating, then the parts of ours."""
    target = ["--target", args.target] if args.target else []
    run = [sys.executable, "-c", RUN, "run", model, PROMPT, "--raw", "-n", "1"]
    commands = {"headrace": [*run, "--threads", str(args.threads), *target]}
    for label, python in peers.items():
        commands[label] = [python, "-c", RUN_LLAMA, model, PROMPT, str(args.threads)]
    runs: dict[str, list[tuple[float, int]]] = {side: [] for side in commands}
    for _ in range(args.runs + 1):  # the first one warms the caches
        for side, command in commands.items():
            runs[side].append(first_token(command))
    sides = {
        side: {
            "first_token_s": min(seconds for seconds, _ in found[1:]),
            "peak_rss_bytes": min(peak for _, peak in found[1:]),
        }
        for side, found in runs.items()
    }
    inside = [sys.executable, "-c", PARTS, model, PROMPT, str(args.threads), *target[1:]]
    all_parts = [parts_of(inside) for _ in range(args.runs)]
    return {
        "model": model,
        "sides": sides,
        "parts_s": min(all_parts, key=lambda p: sum(p.values())),
    }


def markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        "| process start to first token | wall | peak memory |",
        "| --- | ---: | ---: |",
    ]
    for side, figures in result["sides"].items():
        peak_mb = figures["peak_rss_bytes"] / 1e6
        lines.append(f"| {side} | {figures['first_token_s']:.3f} s | {peak_mb:.0f} MB |")
    lines += ["", "| part (headrace) | ms |", "| --- | ---: |"]
    parts = result["parts_s"]
    lines += [f"| {name} | {seconds * 1e3:.1f} |" for name, seconds in parts.items()]
    lines.append(f"| together | {sum(parts.values()) * 1e3:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument(
        "--peer", "--llama-python", metavar="PYTHON", help="an interpreter with llama-cpp-python"
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    parser.add_argument("--target", help="force a CPU level of headrace, such as x86-64-v3")
    parser.add_argument("--json", type=Path, help="keep the figures")
    args = parser.parse_args()
    from headrace.loaders.sources import resolve

    if args.threads is None:
        from headrace.team import default_threads

        args.threads = default_threads()
    peers = {}
    if args.peer or importlib.util.find_spec("llama_cpp"):
        peers["llama-cpp-python"] = args.peer or sys.executable
    result = measure(str(resolve(args.model)), peers, args)
    print(markdown(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
