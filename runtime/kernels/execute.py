"""The native loop: every thread of a team walks the steps of a plan, with barriers between them.

Step (8 slots of 8 bytes): kernel address, argument block, flags (1: barrier after it, 2: wait for
the request first, 4: give its slot back afterwards, 8: go back as many steps as slot 7 says while
the word at slot 6 is not 0), address and bytes of the weights that come next (0: none), address of
a request of the window (`headrace.offload.requests`; 0: none), address of a word, a number of
steps. A thread that has reached a barrier asks for the first lines of its share of the next
weights: the memory works while the threads wait for each other.
Job (slots): 0 steps, 1 their number, 2 address of the barrier counter, 3 address of the cancel
word, 4 address of a yield function of the operating system (0: none), 5 pauses before a waiting
thread yields, 6 ticks array (0: no timing; one int64 per step and one more, which is written only
when the job was not cancelled), 7 window (0: none).
Team (slots; each word that threads share has a cache line of its own, 8 slots):
    0 generation, 8 done counter, 16 barrier counter, 24 cancel word, 32 job, 33 threads,
    34 pauses before an idle thread parks, 35 yield function, 36 pauses before yielding, 37 stop
"""

from __future__ import annotations

from typing import Any

from headrace.offload import requests
from headrace.offload.requests import SPAN, give_back, wait_for
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    atomic_add,
    atomic_get,
    atomic_put,
    call_kernel,
    call_void,
    clock,
    int_to_ptr,
    prefetch,
    put_i64,
    spin_pause,
)
from headrace.targets.table import Kernel, no_cases, same_for_all

GENERATION, DONE, BARRIER, CANCEL, JOB, THREADS, PARK, YIELD, PATIENCE, STOP = (
    0, 8, 16, 24, 32, 33, 34, 35, 36, 37,
)  # fmt: skip
TEAM_SLOTS = 64
STEP_BARRIER, STEP_WAIT, STEP_GIVE, STEP_LOOP = 1, 2, 4, 8
STEP_SLOTS = 8
JOB_WINDOW = 7
PREFETCH_LINES = 32


def walk(job: Any, thread: Any, n_threads: Any) -> None:
    """One thread's part of a job."""
    steps = arg_ptr(job, 0)
    n_steps = arg_int(job, 1)
    barrier = arg_ptr(job, 2)
    cancel = arg_ptr(job, 3)
    yield_address = arg_int(job, 4)
    patience = arg_int(job, 5)
    ticks = arg_int(job, 6)
    window = arg_int(job, 7)
    began = clock()
    expected = 0
    stopped = False
    i = 0
    while i < n_steps and not stopped:
        if ticks != 0 and thread == 0:
            put_i64(int_to_ptr(ticks) + i * 8, clock())
        step = steps + i * (STEP_SLOTS * 8)
        flags = arg_int(step, 2)
        if flags & STEP_WAIT != 0:
            wait_for(arg_ptr(job, 7), arg_ptr(step, 5), cancel, thread)
        call_kernel(arg_ptr(step, 0), arg_ptr(step, 1), thread, n_threads)
        if flags & STEP_GIVE != 0:
            give_back(arg_ptr(job, 7), arg_ptr(step, 5), n_threads)
        back = 0
        # Read in front of the barrier: behind it thread 0 may write the word of the next turn.
        if flags & STEP_LOOP != 0 and atomic_get(arg_ptr(step, 6)) != 0:
            back = arg_int(step, 7)
        if flags & STEP_BARRIER != 0 and n_threads > 1:
            expected += n_threads
            atomic_add(barrier, 1)
            ahead = arg_int(step, 4)
            if ahead != 0:
                lines = int_to_ptr(arg_int(step, 3)) + ahead // n_threads * thread
                for line in range(PREFETCH_LINES):
                    prefetch(lines + line * 64)
            spins = 0
            while atomic_get(barrier) < expected and not stopped:
                spin_pause()
                spins += 1
                if spins >= patience:
                    spins = 0
                    if yield_address != 0:
                        call_void(int_to_ptr(yield_address))
                    stopped = atomic_get(cancel) != 0
        if atomic_get(cancel) != 0:
            stopped = True
        i += 1 - back
    if ticks != 0 and thread == 0 and not stopped:
        put_i64(int_to_ptr(ticks) + n_steps * 8, clock())
    if window != 0 and thread == 0:
        put_i64(int_to_ptr(window) + SPAN * 8, clock() - began)


def _announce(team: Any) -> None:
    atomic_put(team + 64, 0)
    atomic_put(team + 128, 0)
    atomic_add(team, 1)


def lead(team: Any, thread: Any, n_threads: Any) -> None:
    """Thread 0's part of a job: announce it, walk the steps, wait until the others have left.

    All in one call: an exception of Python between them would leave the others waiting for ever.
    """
    _announce(team)
    walk(arg_ptr(team, 32), 0, n_threads)
    done = team + 64
    spins = 0
    while atomic_get(done) < n_threads - 1:
        spin_pause()
        spins += 1
        if spins >= arg_int(team, 36):
            spins = 0
            if arg_int(team, 35) != 0:
                call_void(int_to_ptr(arg_int(team, 35)))


def work(own: Any, thread: Any, n_threads: Any) -> None:
    """A worker: take part in every job until none has come for a while, or the team stops.

    Slots of its own: 0 team, 1 last generation seen (updated).
    """
    team = arg_ptr(own, 0)
    seen = arg_int(own, 1)
    idle = 0
    limit = arg_int(team, 34)
    while idle < limit:
        generation = atomic_get(team)
        if generation == seen:
            spin_pause()
            idle += 1
        else:
            idle = 0
            seen = generation
            put_i64(own + 8, seen)
            if atomic_get(team + 37 * 8) != 0:
                idle = limit
            else:
                walk(arg_ptr(team, 32), thread, arg_int(team, 33))
            atomic_add(team + 64, 1)


def stop(team: Any, thread: Any, n_threads: Any) -> None:
    """Send the workers home; may be done again."""
    atomic_put(team + 37 * 8, 1)
    _announce(team)


def kernels() -> dict[str, Kernel]:
    """The rows "lead", "work" and "stop"."""
    return {
        name: Kernel(
            f"team_{name}",
            same_for_all(fn),
            (__name__, requests.__name__),
            no_cases,  # tests/test_team.py runs it
            __name__,
        )
        for name, fn in (("lead", lead), ("work", work), ("stop", stop))
    }


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return list(kernels().values())


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
