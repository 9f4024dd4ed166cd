"""HEADRACE_DEBUG=1: what each kind of step of a plan costs, printed when the model is closed."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import numpy as np

from headrace.plan import Program


class Trace:
    """Sums of time, by program and kernel, as thread 0 sees them (barriers included)."""

    def __init__(self) -> None:
        self._ticks: dict[int, tuple[Program, np.ndarray, int]] = {}
        self._total_ticks = 0
        self._total_s = 0.0

    @contextlib.contextmanager
    def measure(self, program: Program) -> Iterator[np.ndarray]:
        """An array for the native loop to write its clock to; summed up afterwards."""
        ticks = np.zeros(len(program.steps) + 1, np.int64)
        began = time.perf_counter()
        yield ticks
        self._total_s += time.perf_counter() - began
        if ticks[-1] == 0:
            return  # cancelled on the way
        self._total_ticks += int(ticks[-1] - ticks[0])
        spent = np.diff(ticks)
        _, before, runs = self._ticks.get(id(program), (program, np.zeros_like(spent), 0))
        self._ticks[id(program)] = (program, before + spent, runs + 1)

    def report(self) -> None:
        """Print a table of the kernels to stderr, the most expensive first."""
        if not self._total_ticks:
            return
        seconds = self._total_s / self._total_ticks
        for program, ticks, runs in self._ticks.values():
            rows: dict[str, tuple[int, float, int]] = {}
            for step, spent in zip(program.steps, ticks, strict=True):
                count, time_s, n_bytes = rows.get(step.kernel, (0, 0.0, 0))
                time_s += float(spent) * seconds
                rows[step.kernel] = (count + 1, time_s, n_bytes + step.n_bytes)
            total = sum(time_s for _, time_s, _ in rows.values())
            print(
                f"plan of {len(program.steps)} steps, run {runs} times, "
                f"{total / runs * 1e3:.3f} ms each",
                file=sys.stderr,
            )
            for name, (count, time_s, n_bytes) in sorted(rows.items(), key=lambda r: -r[1][1]):
                rate = f"{n_bytes * runs / time_s / 1e9:8.1f} GB/s" if n_bytes else ""
                print(
                    f"  {name:28} {count:4} x {time_s / runs * 1e6:9.1f} us "
                    f"{100 * time_s / total:5.1f}% {rate}",
                    file=sys.stderr,
                )


def trace_from_environment() -> Trace | None:
    """A trace when HEADRACE_DEBUG asks for one."""
    return Trace() if os.environ.get("HEADRACE_DEBUG", "0") not in ("", "0") else None
