"""HEADRACE_DEBUG=1: what each kind of step of a plan costs, printed when the model is closed.

A step's figure is its best over all runs, so that other work on the machine does not show.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import numpy as np

from headrace.programs import Program


class Trace:
    """Best time of every step as thread 0 sees it (with barriers), and the mean of whole runs."""

    def __init__(self) -> None:
        self._ticks: dict[int, tuple[Program, np.ndarray, int, int]] = {}
        self._total_ticks = 0
        self._total_s = 0.0

    @contextlib.contextmanager
    def measure(self, program: Program) -> Iterator[np.ndarray]:
        """An array for the native loop to write its clock to; summed up afterwards."""
        ticks = np.zeros(len(program.kernels) + 1, np.int64)
        began = time.perf_counter()
        yield ticks
        spent_s = time.perf_counter() - began
        if ticks[-1] == 0:
            return  # cancelled on the way
        self._total_s += spent_s
        self._total_ticks += int(ticks[-1] - ticks[0])
        spent = np.diff(ticks)
        _, best, total, runs = self._ticks.get(id(program), (program, spent, 0, 0))
        self._ticks[id(program)] = (
            program,
            np.minimum(best, spent),
            total + int(spent.sum()),
            runs + 1,
        )

    def report(self) -> None:
        """Print a table of the kernels to stderr, the most expensive first."""
        if not self._total_ticks:
            return
        seconds = self._total_s / self._total_ticks
        for program, best, ticks, runs in self._ticks.values():
            rows: dict[str, tuple[int, float, int]] = {}
            for kernel, size, spent in zip(program.kernels, program.sizes, best, strict=True):
                count, time_s, n_bytes = rows.get(kernel, (0, 0.0, 0))
                rows[kernel] = (
                    count + 1,
                    time_s + float(spent) * seconds,
                    n_bytes + int(size),
                )
            total_s = sum(time_s for _, time_s, _ in rows.values())
            print(
                f"plan of {len(program.kernels)} steps, run {runs} times, mean "
                f"{ticks * seconds / runs * 1e3:.3f} ms, best steps together "
                f"{total_s * 1e3:.3f} ms",
                file=sys.stderr,
            )
            for name, (count, time_s, n_bytes) in sorted(rows.items(), key=lambda r: -r[1][1]):
                rate = f"{n_bytes / time_s / 1e9:8.1f} GB/s" if n_bytes else ""
                print(
                    f"  {name:28} {count:4} x {time_s * 1e6:9.1f} us "
                    f"{100 * time_s / total_s:5.1f}% {rate}",
                    file=sys.stderr,
                )


def trace_from_environment() -> Trace | None:
    """A trace when HEADRACE_DEBUG asks for one."""
    return Trace() if os.environ.get("HEADRACE_DEBUG", "0") not in ("", "0") else None
