"""What this machine can do, measured: memory read bandwidth, cached per CPU and thread count."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from headrace.atomic_file import write_whole
from headrace.available import available_bytes
from headrace.folders import cache_root
from headrace.kernels import execute, probe
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.targets.pack import Kernels
from headrace.team import Team

QUICK_BYTES = 256 << 20
BENCH_BYTES = 1 << 30
LEAST_BYTES = 128 << 20  # less may lie in a cache


def read_bandwidth(store: Kernels, team: Team, n_bytes: int, runs: int = 5) -> float:
    """Bytes per second that all threads of `team` read together from huge pages; best of `runs`."""
    buffer = Arena({"data": n_bytes})
    buffer.view("data")[::4096] = 1  # touch every page
    out = np.zeros(team.n_threads * 64 + 64, np.uint8)
    address = store.load([probe.kernel()])["probe_read"]
    block = argument_block([buffer.address("data"), n_bytes // 512, out])
    steps = np.zeros((1, execute.STEP_SLOTS), np.int64)
    steps[0, :3] = address, block.ctypes.data, execute.STEP_BARRIER
    best = float("inf")
    for _ in range(runs + 1):
        start = time.perf_counter()
        team.run(steps)
        best = min(best, time.perf_counter() - start)
    return n_bytes / best


def buffer_bytes(wanted: int) -> int | None:
    """Size of a buffer to measure with, half of what is free at most; None: that is too small."""
    available = available_bytes()
    most = wanted if available is None else min(wanted, available // 2)
    return None if most < LEAST_BYTES else most >> 20 << 20


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("model name", "Hardware", "Processor")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cache_file() -> Path:
    return cache_root() / "machine.json"


def _key(target_name: str, threads: int) -> str:
    return f"{_cpu_name()}; {os.cpu_count()} CPUs; {threads} threads; {target_name}"


def _known() -> dict[str, float]:
    try:
        known = json.loads(_cache_file().read_text())
        return {str(k): float(v) for k, v in known.items() if float(v) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def known_read_bandwidth(target_name: str, threads: int) -> float | None:
    """The best that was measured before on this CPU; None: nothing was."""
    return _known().get(_key(target_name, threads))


def remember_read_bandwidth(target_name: str, threads: int, value: float) -> None:
    """Keep a measured bandwidth for later plans; the best counts, as other work only slows it."""
    known = _known()
    key = _key(target_name, threads)
    known[key] = max(value, known.get(key, 0.0))
    with contextlib.suppress(OSError):  # measured again next time
        write_whole(_cache_file(), json.dumps(known, indent=1).encode(), durable=False)


def best_read_bandwidth(store: Kernels, team: Team) -> float | None:
    """The best read bandwidth in bytes per second that was seen on this CPU with these threads.

    It is measured each time (0.1 s), since one moment may be a busy one. None when it is not known
    yet, and there is too little memory free to measure it.
    """
    name, threads = store.target.name, team.n_threads
    known = known_read_bandwidth(name, threads)
    n_bytes = buffer_bytes(QUICK_BYTES)
    if n_bytes is None:
        return known
    value = read_bandwidth(store, team, n_bytes)
    remember_read_bandwidth(name, threads, value)
    return max(value, known or 0.0)
