"""Headrace beside llama.cpp on this machine: both sides alternate in the same run.

    python examples/benchmarks/peers.py [MODEL.gguf ...] [--peer [LABEL=]PYTHON ...]
        [--what prefill decode depth] [--rounds 3] [--target x86-64-v3]
        [--chart out.png] [--json out.json] [--readme README.md]

MODEL is what `headrace run` takes; the published SmolLM2 when none is given. A peer is a Python
interpreter that has llama-cpp-python; the one that runs this script when it has it. Every
measurement is a fresh process with the same number of threads; in every second round the sides
swap places. The table has the best of all rounds, the JSON also the median of the rounds' bests
and everything that each process said. Bandwidth is the machine's own read rate (1 GiB on huge
pages, all threads), the best that any headrace process of the run measured.

The machine should do nothing else: a busy second core takes 40% off one side and flatters the
other. The script waits a little when it finds the machine busy, then says so and goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = "headrace"
BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
BUSY_SHARE = 0.08  # of all cores, by others, above which a measurement is not to be trusted
WHAT = ("prefill", "decode", "depth")

# `headrace bench --json` in another process; the API because it also decodes at a depth.
OUR_SIDE = (
    "import json, sys\n"
    "from headrace.bench import bench\n"
    "print(json.dumps(bench(**json.loads(sys.argv[1]))))\n"
)


@dataclass
class Row:
    """One line of the table: what one file does on every side."""

    model: str
    what: str
    label: str
    key: str  # in the JSON of a side
    rates: dict[str, list[float]] = field(default_factory=dict)  # by side, one a round
    bytes_per_token: float | None = None
    share: float | None = None

    def best(self, side: str) -> float:
        """Tokens per second of the best round."""
        return max(self.rates[side])

    def ratio(self, peer: str) -> float:
        """Ours over the peer's."""
        return self.best(OURS) / self.best(peer)


@dataclass(frozen=True)
class Work:
    """What a pair of processes does: a file, and the halves that are measured."""

    model: str
    prefill: bool
    decode: bool
    context: int = 0


# ---- the two sides --------------------------------------------------------------------------


def call(command: list[str]) -> dict[str, Any]:
    """Run a measuring process and read the JSON object on the last line that it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise SystemExit(f"{shlex.join(command[:3])} ... failed ({done.returncode}):\n{tail}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def measure_ours(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """One process of headrace; a half that is not wanted shrinks to one token."""
    return call(
        [
            sys.executable,
            "-c",
            OUR_SIDE,
            json.dumps(
                {
                    "model": work.model,
                    "prompt_tokens": args.prompt_tokens if work.prefill else 1,
                    "new_tokens": args.new_tokens if work.decode else 1,
                    "context_tokens": work.context,
                    "threads": args.threads,
                    "target": args.target,
                    "runs": args.runs,
                }
            ),
        ]
    )


def measure_peer(python: str, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """One process of llama.cpp doing the same."""
    return call(
        [
            python,
            str(HERE / "llama_cpp_bench.py"),
            work.model,
            "-p", str(args.prompt_tokens if work.prefill else 0),
            "-n", str(args.new_tokens if work.decode else 0),
            "-t", str(args.threads),
            "-r", str(args.runs),
            "--context", str(work.context),
        ]
    )  # fmt: skip


# ---- is the machine quiet? --------------------------------------------------------------------


def busy_share(seconds: float = 0.4) -> float:
    """Share of all cores that others use just now; nothing of ours may be running."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100


def settle(patience_s: float) -> float:
    """Wait for the others to finish, but not for ever; gives what they use then."""
    deadline = time.monotonic() + patience_s
    share = busy_share()
    while share > BUSY_SHARE and time.monotonic() < deadline:
        share = busy_share()
    return share


def warn(text: str) -> None:
    """Say it where it does not disturb the table."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def warn_of_load() -> None:
    """The load average at the start, before it holds our own processes."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.3:
        warn(f"the load average is {load:.2f}: something else runs here; figures will be off")


# ---- rounds -----------------------------------------------------------------------------------


def plan_work(models: list[str], args: argparse.Namespace) -> list[Work]:
    """Processes of one round, for each side."""
    works = []
    for model in models:
        if "prefill" in args.what or "decode" in args.what:
            works.append(Work(model, "prefill" in args.what, "decode" in args.what))
        if "depth" in args.what:
            works.append(Work(model, False, True, args.context))
    return works


def rows_of(work: Work, args: argparse.Namespace) -> list[Row]:
    """The lines of the table that a piece of work fills."""
    name = Path(work.model).name.removesuffix(".gguf")
    rows = []
    if work.prefill:
        label = f"prefill {args.prompt_tokens}"
        rows.append(Row(name, "prefill", label, "prefill_tok_s"))
    if work.decode:
        label = f"decode {args.new_tokens}"
        label += f" after {work.context}" if work.context else ""
        rows.append(Row(name, "depth" if work.context else "decode", label, "decode_tok_s"))
    return rows


def run_rounds(
    works: list[Work], peers: dict[str, str], args: argparse.Namespace
) -> tuple[list[Row], list[dict[str, Any]], int]:
    """Alternate the sides; gives (rows, everything that the processes said, disturbances)."""
    rows = {work: rows_of(work, args) for work in works}
    said: list[dict[str, Any]] = []
    disturbed = 0
    for turn in range(args.rounds):
        for work in works:
            sides = [OURS, *peers]
            for side in sides if turn % 2 == 0 else reversed(sides):
                share = settle(args.patience)
                if share > BUSY_SHARE:
                    disturbed += 1
                    warn(f"others use {share:.0%} of the CPU before {side} on {work.model}")
                if side == OURS:
                    result = measure_ours(work, args)
                else:
                    result = measure_peer(peers[side], work, args)
                said.append({"round": turn, "side": side, "others_cpu": share, **result})
                for row in rows[work]:
                    row.rates.setdefault(side, []).append(float(result[row.key]))
                    if side == OURS and row.what != "prefill":
                        row.bytes_per_token = float(result["bytes_per_token"]) + float(
                            result["kv_bytes_read_per_token"]
                        )
                print(progress_line(turn, side, rows[work]), file=sys.stderr, flush=True)
    return [row for work in works for row in rows[work]], said, disturbed


def add_shares(rows: list[Row], said: list[dict[str, Any]]) -> float:
    """Set what decoding reaches of the bandwidth; gives that, in GB/s: the run's best."""
    bandwidth = max(float(one["memory_read_gb_s"]) for one in said if one["side"] == OURS)
    for row in rows:
        if row.bytes_per_token is not None:
            row.share = row.best(OURS) * row.bytes_per_token / (bandwidth * 1e9)
    return bandwidth


def progress_line(turn: int, side: str, rows: list[Row]) -> str:
    """What has just been measured."""
    parts = [f"{row.label} {row.rates[side][-1]:.1f} tok/s" for row in rows]
    return f"round {turn + 1}  {rows[0].model}  {side}: {', '.join(parts)}"


# ---- output -----------------------------------------------------------------------------------


def rate(value: float) -> str:
    """Tokens per second with three or four digits."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def markdown(rows: list[Row], peers: list[str], against: str | None) -> str:
    """The table; `against` names the file whose peer figure every prefill is compared with too."""
    head = ["model", "what", f"{OURS}, tok/s"]
    for peer in peers:
        head += [f"{peer}, tok/s", "ratio"]
    if against:
        head.append(f"ratio to {peers[0]} on {against}")
    head.append("share of bandwidth")
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for row in rows:
        cells = [row.model, row.label, rate(row.best(OURS))]
        for peer in peers:
            cells += [rate(row.best(peer)), f"{row.ratio(peer):.2f}"]
        if against:
            base = [r for r in rows if r.model == against and r.what == row.what == "prefill"]
            cells.append(f"{row.best(OURS) / base[0].best(peers[0]):.2f}" if base else "")
        cells.append("" if row.share is None else f"{row.share:.0%}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cpu_name() -> str:
    """What the system calls this CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def summary(said: list[dict[str, Any]], bandwidth: float, disturbed: int, command: str) -> str:
    """Where and how the table was measured."""
    from headrace import __version__

    ours = next(one for one in said if one["side"] == OURS)
    versions = sorted({one["peer"] for one in said if one["side"] != OURS})
    rounds = 1 + max(one["round"] for one in said)
    lines = [
        f"{cpu_name()}, {ours['threads']} threads, target {ours['target']}, read bandwidth "
        f"{bandwidth:.1f} GB/s in the same run; headrace {__version__}"
        + "".join(f", {version}" for version in versions)
        + f"; best of {rounds} alternating rounds, {time.strftime('%Y-%m-%d')}."
    ]
    if disturbed:
        lines.append(f"The machine was busy with something else before {disturbed} measurements.")
    return "\n".join([*lines, "", f"    {command}"])


def draw(path: Path, rows: list[Row], peers: list[str], title: str) -> None:
    """A bar chart: one panel for each kind of work, a group of bars for each file."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the chart takes matplotlib: pip install 'headrace[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in WHAT if any(row.what == kind for row in rows)]
    figure, axes = pyplot.subplots(
        len(kinds), 1, squeeze=False, figsize=(8, 0.9 + 2.6 * len(kinds)), layout="constrained"
    )
    sides = [OURS, *peers]
    height = 0.8 / len(sides)
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        group = [row for row in rows if row.what == kind]
        for i, side in enumerate(sides):
            at = [place + i * height for place in range(len(group))]
            bars = axis.barh(at, [row.best(side) for row in group], height, label=side)
            axis.bar_label(bars, [rate(row.best(side)) for row in group], padding=3, fontsize=8)
        middle = 0.4 - height / 2
        axis.set_yticks([i + middle for i in range(len(group))], [row.model for row in group])
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel(f"{group[0].label}: tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.suptitle(textwrap.fill(title, 95), fontsize=9)
    figure.savefig(path, dpi=144)


def fill(readme: Path, text: str) -> None:
    """Put the table between the marks of a README."""
    whole = readme.read_text("utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme} has no {BEGIN} ... {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


# ---- the command line --------------------------------------------------------------------------


def peers_of(args: argparse.Namespace) -> dict[str, str]:
    """Interpreters by label."""
    found = {}
    for text in args.peer:
        label, equals, python = text.partition("=")
        found[label if equals else "llama.cpp"] = python if equals else text
    if not found and importlib.util.find_spec("llama_cpp"):
        found["llama.cpp"] = sys.executable
    if not found:
        warn("no peer: pip install 'headrace[bench]', or name an interpreter with --peer")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2-135m"], metavar="MODEL")
    parser.add_argument(
        "--peer", "--llama-python", action="append", default=[], metavar="[LABEL=]PYTHON",
        help="an interpreter that has llama-cpp-python (may be given again)",
    )  # fmt: skip
    parser.add_argument("--what", nargs="+", choices=WHAT, default=["prefill", "decode"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides")
    parser.add_argument("--runs", type=int, default=3, help="runs within a process, best taken")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512)
    parser.add_argument("-n", "--new-tokens", type=int, default=128)
    parser.add_argument("--context", type=int, help="tokens before `depth` decodes; sets --what")
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    parser.add_argument("--target", help="force a CPU level of headrace, such as x86-64-v3")
    parser.add_argument(
        "--against", metavar="MODEL", help="also compare prefill with the peer's on this file"
    )
    parser.add_argument(
        "--patience", type=float, default=15, help="seconds to wait for a busy machine, each time"
    )
    parser.add_argument("--chart", type=Path, help="draw a bar chart (PNG, SVG or PDF)")
    parser.add_argument("--json", type=Path, help="keep the raw figures")
    parser.add_argument("--readme", type=Path, help="put the table between its benchmark marks")
    args = parser.parse_args(argv)
    if args.context is not None and "depth" not in args.what:
        args.what = [*args.what, "depth"]
    args.context = 4000 if args.context is None else args.context
    if args.threads is None:
        from headrace.team import default_threads

        args.threads = default_threads()
    if min(args.rounds, args.runs, args.prompt_tokens, args.new_tokens, args.context) < 1:
        parser.error("counts must be at least 1")
    return args


def shown_command(args: argparse.Namespace, peers: dict[str, str]) -> str:
    """The command as others would type it: no paths of this machine, no outputs."""
    words = ["python", "examples/benchmarks/peers.py", *(Path(m).name for m in args.models)]
    words += [word for label in peers for word in ("--peer", f"{label}=PYTHON")]
    words += ["--what", *args.what, "--rounds", str(args.rounds), "--runs", str(args.runs)]
    words += ["-p", str(args.prompt_tokens), "-n", str(args.new_tokens)]
    words += ["--context", str(args.context)] if "depth" in args.what else []
    words += ["--target", args.target] if args.target else []
    words += ["--against", Path(args.against).name] if args.against else []
    return shlex.join(words)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write what was asked for."""
    args = parse(argv)
    from headrace.loaders.sources import resolve

    warn_of_load()
    peers = peers_of(args)
    models = [str(resolve(model)) for model in args.models]
    against = None
    if args.against:
        against = Path(resolve(args.against)).name.removesuffix(".gguf")
        if against not in {Path(model).name.removesuffix(".gguf") for model in models} or not peers:
            raise SystemExit("--against takes one of the models, and a peer")
    rows, said, disturbed = run_rounds(plan_work(models, args), peers, args)
    bandwidth = add_shares(rows, said)
    command = shown_command(args, peers)
    table = markdown(rows, list(peers), against)
    text = f"{table}\n\n{summary(said, bandwidth, disturbed, command)}"
    print(text)
    if args.json:
        medians = [
            {side: statistics.median(rates) for side, rates in row.rates.items()} for row in rows
        ]
        lines = [
            {**asdict(row), "best": {side: row.best(side) for side in row.rates}, "median": median}
            for row, median in zip(rows, medians, strict=True)
        ]
        kept = {"command": command, "memory_read_gb_s": bandwidth, "rows": lines, "said": said}
        args.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    if args.chart:
        draw(args.chart, rows, list(peers), summary(said, bandwidth, 0, "").splitlines()[0])
    if args.readme:
        if args.chart:
            shown = os.path.relpath(args.chart.resolve(), args.readme.resolve().parent)
            text = f"![tokens per second]({Path(shown).as_posix()})\n\n{text}"
        fill(args.readme, text)


if __name__ == "__main__":
    main()
