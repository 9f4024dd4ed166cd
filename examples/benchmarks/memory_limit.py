"""Run a command under a real memory limit, cold: in a control group of its own, caches dropped.

    sudo python memory_limit.py 1000MB --runs 20 -- \\
        headrace bench 7b-q4_0.gguf --memory 1000MB -p 16 -n 8 --json

The system's page cache counts in the group, and a page that another group has read already would
not: so the caches of the whole machine are dropped before every run. Prints one JSON line for each
run: what the command printed (its last line of JSON), how it ended, whether it was killed, and the
most that the group had. Needs root, for the group and for dropping caches; Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from headrace.sizes import parse_size

ROOT = Path("/sys/fs/cgroup")
# Names in version 1 and in version 2.
LIMIT = ("memory.limit_in_bytes", "memory.max")
PEAK = ("memory.max_usage_in_bytes", "memory.peak")


@contextlib.contextmanager
def group(n_bytes: int) -> Iterator[tuple[Path, int]]:
    """A group with this limit, and which version it is of; removed afterwards."""
    version = 0 if (ROOT / "memory").is_dir() else 1
    folder = (ROOT / "memory" if version == 0 else ROOT) / f"headrace-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / LIMIT[version]).write_text(str(n_bytes))
        with contextlib.suppress(OSError):  # no swap, where there is any
            swap = "memory.memsw.limit_in_bytes" if version == 0 else "memory.swap.max"
            (folder / swap).write_text(str(n_bytes if version == 0 else 0))
        yield folder, version
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)


def drop_caches() -> None:
    """Forget all files that the machine has in memory."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run(limit: int, command: list[str]) -> dict[str, object]:
    """One run under the limit."""
    drop_caches()
    with group(limit) as (folder, version):
        enter = f'echo $$ > "{folder}/cgroup.procs" && exec "$@"'
        began = time.perf_counter()
        done = subprocess.run(
            ["sh", "-c", enter, "sh", *command], capture_output=True, text=True, check=False
        )
        spent = time.perf_counter() - began
        peak = 0
        with contextlib.suppress(OSError):
            peak = int((folder / PEAK[version]).read_text())
    printed: object = None
    for line in reversed(done.stdout.splitlines()):
        with contextlib.suppress(ValueError):
            printed = json.loads(line)
            break
    if printed is None:
        with contextlib.suppress(ValueError):
            printed = json.loads(done.stdout)
    return {
        "limit_bytes": limit,
        "seconds": spent,
        "status": done.returncode,
        "killed": done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL),
        "group_peak_bytes": peak,
        "error": done.stderr.strip()[-300:] if done.returncode else None,
        "printed": printed,
    }


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("limit", help="such as 1000MB")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    for _ in range(args.runs):
        print(json.dumps(run(parse_size(args.limit), args.command)), flush=True)


if __name__ == "__main__":
    main()
