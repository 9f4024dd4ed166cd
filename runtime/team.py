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
import time
from pathlib import Path
from typing import Any

import numpy as np

from headrace.cgroups import cgroup_folders
from headrace.errors import HeadraceError
from headrace.interruptible import persist, run_aside
from headrace.kernels import execute
from headrace.memory import aligned_slots
from headrace.targets.table import ENTRY

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
    """Whole CPUs of the tightest quota of this process's cgroups, at least 1; None: no quota."""
    found = [n for n in map(_quota_of, cgroup_folders("cpu")) if n is not None]
    return min(found) if found else None


def _quota_of(folder: Path) -> int | None:
    try:
        if (folder / "cpu.max").exists():  # version 2
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        # No quota is "max" in version 2, and -1 in version 1.
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
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


class Team:
    """`n_threads` threads, the caller among them; `addresses` of the kernels team_*.

    Not for two callers at a time: a model takes its own lock around `run`. Signals may raise
    exceptions between any two instructions of the caller: whatever they cut off here, the workers
    are left idle or are waited for, and the next job finds them so.
    """

    def __init__(self, addresses: dict[str, int], n_threads: int) -> None:
        if n_threads < 1:
            raise ValueError(f"threads must be at least 1, not {n_threads}")
        self.n_threads = n_threads
        self._lead = ENTRY(addresses["team_lead"])
        self._work = ENTRY(addresses["team_work"])
        self._stop = ENTRY(addresses["team_stop"])
        self._shared = aligned_slots(execute.TEAM_SLOTS)
        self._base = self._shared.ctypes.data
        self._job = aligned_slots(8)
        self._pid = os.getpid()
        self._closed = False
        self._coming = False  # workers do not park, for a job comes or is going on
        self._parked: set[int] = set()
        # A worker parks by taking its bell, which is rung by releasing it: one instruction, where
        # a condition could be left locked by an interrupt.
        self._bells = [threading.Lock() for _ in range(n_threads)]
        self._aside = threading.Lock()  # held by a job that runs in a thread of its own
        shared = self._shared
        shared[execute.JOB] = self._job.ctypes.data
        shared[execute.THREADS] = n_threads
        shared[execute.PARK] = PARK_PAUSES
        shared[execute.YIELD] = _yield_address()
        shared[execute.PATIENCE] = YIELD_PAUSES
        job = self._job
        job[2] = self._base + 8 * execute.BARRIER
        job[3] = self.cancel_address
        job[4] = shared[execute.YIELD]
        job[5] = YIELD_PAUSES
        self._own = [aligned_slots(8) for _ in range(n_threads)]
        self._threads: list[threading.Thread] = []
        try:
            self._start()
        except BaseException:  # Ctrl-C, or the system has no more threads
            self.close()
            raise

    @property
    def cancel_address(self) -> int:
        """Of the word that ends the present job where it is not 0."""
        return self._base + 8 * execute.CANCEL

    def _start(self) -> None:
        for i in range(1, self.n_threads):
            self._own[i][0] = self._base
            self._bells[i].acquire()
            thread = threading.Thread(
                target=self._serve, args=(i,), name=f"headrace-{i}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _serve(self, index: int) -> None:
        own, bell = self._own[index].ctypes.data, self._bells[index]
        while not self._closed:
            self._work(own, index, self.n_threads)
            self._parked.add(index)
            # The caller says what comes before it looks who is parked: one of us sees the other.
            while not (self._coming or self._closed):
                bell.acquire()
            self._parked.discard(index)

    def _wake(self) -> None:
        if self._parked:
            for bell in self._bells[1:]:
                if bell.locked():
                    bell.release()

    def run(
        self, steps: np.ndarray, *, ticks: np.ndarray | None = None, interruptible: bool = False,
        window: int = 0,
    ) -> bool:  # fmt: skip
        """Run a plan's steps [n, 8] on all threads; False when it was cancelled on the way.

        Args:
            window: address of the window whose requests the steps wait for (0: none).
            ticks: int64 [n + 1] that receives the clock before each step and after the last, which
                stays as it is when the job is cancelled.
            interruptible: stay in Python while the team works, so that a signal is delivered at
                once; KeyboardInterrupt then cancels the job and is raised when the team has left.

        Raises:
            HeadraceError: the team is closed, or belongs to the process that this one was forked
                from.
        """
        if self._closed:
            raise HeadraceError("these threads have been ended: the model is closed")
        if os.getpid() != self._pid:
            raise HeadraceError(
                "this model was loaded before the process was forked, and its threads are not in "
                "this one; load a model here, or start processes by 'spawn'"
            )
        self._leave()
        job, shared = self._job, self._shared
        job[0] = steps.ctypes.data
        job[1] = len(steps)
        job[6] = 0 if ticks is None else ticks.ctypes.data
        job[execute.JOB_WINDOW] = window
        shared[execute.CANCEL] = 0
        if interruptible:
            run_aside(self._lead_aside, self.cancel)
        else:
            self._lead_job()
        return not shared[execute.CANCEL]

    def _lead_job(self) -> None:
        try:
            self._coming = True
            self._wake()
            self._lead(self._base, 0, self.n_threads)
        finally:
            self._coming = False

    def _lead_aside(self) -> None:
        with self._aside:
            self._lead_job()

    def _leave(self) -> None:
        """End a job whose caller was interrupted once more while it waited for its end."""
        while self._aside.locked():
            self.cancel()
            time.sleep(0.001)

    def cancel(self) -> None:
        """Stop the running job at its next step; may be called from any thread."""
        self._shared[execute.CANCEL] = 1

    def close(self) -> None:
        """End the threads. The team cannot run anything afterwards.

        Does nothing in a process forked from the one that the threads belong to.
        """
        if os.getpid() != self._pid:
            return
        self._closed = True
        if sys.is_finalizing():
            # The others cannot come back to Python any more, and so cannot be joined.
            self._stop(self._base, 0, self.n_threads)
        else:
            persist(self._end, self._ended)

    def _ended(self) -> bool:
        return not (self._aside.locked() or self._alive())

    def _alive(self) -> list[threading.Thread]:
        # A worker itself may close its team: when it comes upon the last reference to a model.
        mine = threading.current_thread()
        return [t for t in self._threads if t is not mine and t.is_alive()]

    def _end(self) -> None:
        self._leave()
        self._stop(self._base, 0, self.n_threads)
        self._wake()
        for thread in self._alive():
            thread.join()
