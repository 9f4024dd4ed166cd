"""A team of native threads that runs plans together, outside the interpreter's lock.

Workers wait in native code for the next job, spinning, and park in Python after about a
millisecond without one. A short job is led by the calling thread; a long one runs wholly on the
team, so that the caller waits where Python can deliver Ctrl-C.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from headrace.interruptible import run_aside
from headrace.kernels import execute

ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
PARK_PAUSES = 100_000
YIELD_PAUSES = 2_000


def default_threads() -> int:
    """Physical cores that this process may use, within its cgroup's CPU quota."""
    try:
        cpus = sorted(os.sched_getaffinity(0))
    except AttributeError:
        cpus = list(range(os.cpu_count() or 1))
    return max(1, min(len(cpus), _physical(cpus), _quota() or len(cpus)))


def _physical(cpus: list[int]) -> int:
    """Cores behind logical CPUs: hardware threads of one core share its vector units."""
    try:
        # Read directly on Linux: psutil takes 9 ms to import.
        cores = {
            Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list").read_text()
            for i in cpus
        }
        return len(cores)
    except OSError:
        pass
    try:
        import psutil

        return psutil.cpu_count(logical=False) or len(cpus)
    except (ImportError, OSError):
        return len(cpus)


def _quota() -> int | None:
    """Whole CPUs of the cgroup's quota (version 2, then 1), at least 1."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
            micros = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
            period_us = int(file.read())
        return None if micros <= 0 else max(1, micros // period_us)
    except (OSError, ValueError):
        return None


def _yield_address() -> int:
    """Address of the system's "let another thread run", or 0."""
    try:
        if sys.platform == "win32":
            function: Any = ctypes.windll.kernel32.SwitchToThread  # type: ignore[attr-defined]
        else:
            function = ctypes.CDLL(None).sched_yield
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def _aligned(n_slots: int) -> np.ndarray:
    raw = np.zeros(n_slots + 8, np.int64)
    skip = (-raw.ctypes.data % 64) // 8
    return raw[skip : skip + n_slots]


class Team:
    """`n_threads` threads, the caller among them; `addresses` of the kernels team_*.

    Not for two callers at a time: a model takes its own lock around `run`.
    """

    def __init__(self, addresses: dict[str, int], n_threads: int) -> None:
        if n_threads < 1:
            raise ValueError(f"threads must be at least 1, not {n_threads}")
        self.n_threads = n_threads
        self._lead = ENTRY(addresses["team_lead"])
        self._work = ENTRY(addresses["team_work"])
        self._bump = ENTRY(addresses["team_bump"])
        self._shared = _aligned(execute.TEAM_SLOTS)
        self._base = self._shared.ctypes.data
        self._job = _aligned(8)
        self._condition = threading.Condition()
        self._parked = 0
        self._closed = False
        shared = self._shared
        shared[execute.JOB] = self._job.ctypes.data
        shared[execute.THREADS] = n_threads
        shared[execute.PARK] = PARK_PAUSES
        shared[execute.YIELD] = _yield_address()
        shared[execute.PATIENCE] = YIELD_PAUSES
        job = self._job
        job[2] = self._base + 8 * execute.BARRIER
        job[3] = self._base + 8 * execute.CANCEL
        job[4] = shared[execute.YIELD]
        job[5] = YIELD_PAUSES
        self._own = [_aligned(8) for _ in range(n_threads)]
        self._threads = []
        for i in range(1, n_threads):
            self._own[i][0] = self._base
            thread = threading.Thread(
                target=self._serve, args=(i,), name=f"headrace-{i}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _serve(self, index: int) -> None:
        own = self._own[index]
        generation = self._shared[execute.GENERATION : execute.GENERATION + 1]
        while not self._closed:
            self._work(own.ctypes.data, index, self.n_threads)
            with self._condition:
                self._parked += 1
                # The generation moves before the caller looks at `_parked`: one of us sees it.
                while own[1] == generation[0] and not self._closed:
                    self._condition.wait()
                self._parked -= 1

    def _announce(self) -> None:
        self._bump(self._base, 0, self.n_threads)
        if self._parked:
            with self._condition:
                self._condition.notify_all()

    def run(
        self, steps: np.ndarray, *, ticks: np.ndarray | None = None, interruptible: bool = False
    ) -> bool:
        """Run a plan's steps [n, 6] on all threads; False when it was cancelled on the way.

        Args:
            ticks: int64 [n + 1] that receives the clock before each step and after the last.
            interruptible: stay in Python while the team works, so that a signal is delivered at
                once; KeyboardInterrupt then cancels the job and is raised when the team has left.
        """
        job, shared = self._job, self._shared
        job[0] = steps.ctypes.data
        job[1] = len(steps)
        job[6] = 0 if ticks is None else ticks.ctypes.data
        shared[execute.CANCEL] = 0
        if interruptible:
            run_aside(self._lead_job, self.cancel)
        else:
            self._lead_job()
        return not shared[execute.CANCEL]

    def _lead_job(self) -> None:
        self._announce()
        self._lead(self._base, 0, self.n_threads)

    def cancel(self) -> None:
        """Stop the running job at its next step; may be called from any thread."""
        self._shared[execute.CANCEL] = 1

    def close(self) -> None:
        """End the threads. The team cannot run anything afterwards."""
        if self._closed:
            return
        self._closed = True
        self._shared[execute.STOP] = 1
        self._announce()
        for thread in self._threads:
            thread.join()
