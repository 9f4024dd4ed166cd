"""Reads from flash as data: what native threads fill, and what the steps of a plan wait for.

Request (8 slots of 8 bytes, one for each streamed piece of weights, in the order of a pass):
    0 last pass that it has been read for, 1 threads that are done with it (shared by threads)
    2 file descriptor, 3 offset in the file, 4 bytes to ask for, 5 bytes that must come, 6 address
Window (slots; each word that threads change has a cache line of its own):
    0 present pass (from 1), 1 the function that gives a slot back, 2 its argument, 3 the function
    that naps, 4 its argument, 5 pauses before a waiting thread naps, 6 the function that takes a
    slot, 7 the function that reads (0: none, the caller does), 9 the function that drops what was
    read from the system's cache (0: none), 10 requests, 11 their number, 16 next request,
    24 readers stop, 32 a read failed for good, 40 ticks that thread 0 has waited, 41 ticks of its
    whole pass

Requests are numbered through all passes: request q reads piece q % n for pass q // n + 1 into a
slot of the window that is that piece's for good. A reader takes a free slot (a semaphore of the
operating system), then the next number. Pieces are given back in the order in which they are read,
so whose turn it is finds its slot free.
"""

from __future__ import annotations

from typing import Any

from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    atomic_add,
    atomic_get,
    atomic_put,
    call_system,
    clock,
    int_to_ptr,
    put_i64,
    spin_pause,
)
from headrace.targets.table import Kernel, no_cases, same_for_all

REQUEST_SLOTS = 8
READY, DONE, FILE, OFFSET, ASK, NEED, ADDRESS = range(7)
WINDOW_SLOTS = 48
PASS, GIVE, GIVE_TO, NAP, NAP_FOR, PATIENCE, TAKE, READ, DROP, REQUESTS, COUNT = (
    0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11,
)  # fmt: skip
NEXT, STOP, FAILED, STALL, SPAN = 16, 24, 32, 40, 41
# A reader's own slots: its window, and the request that it could not read (-1: none).
OWN_WINDOW, OWN_REQUEST = 0, 1
DONT_NEED = 4  # POSIX_FADV_DONTNEED on Linux


def wait_for(window: Any, request: Any, cancel: Any, thread: Any) -> None:
    """Wait until a request has been read for the present pass, or the job is cancelled."""
    wanted = arg_int(window, PASS)
    if atomic_get(request) < wanted:
        began = clock()
        spins = 0
        waiting = True
        while waiting:
            spin_pause()
            spins += 1
            if spins >= arg_int(window, PATIENCE):
                nap = arg_int(window, NAP)
                if nap != 0:
                    call_system(int_to_ptr(nap), arg_int(window, NAP_FOR), 0, 0, 0)
            if atomic_get(window + FAILED * 8) != 0:
                atomic_put(cancel, 1)
            waiting = atomic_get(request) < wanted and atomic_get(cancel) == 0
        if thread == 0:
            put_i64(window + STALL * 8, arg_int(window, STALL) + (clock() - began))


def give_back(window: Any, request: Any, n_threads: Any) -> None:
    """A thread has done with a request; the last one frees its slot."""
    if atomic_add(request + DONE * 8, 1) == n_threads - 1:
        atomic_put(request + DONE * 8, 0)
        give = arg_int(window, GIVE)
        if give != 0:
            call_system(int_to_ptr(give), arg_int(window, GIVE_TO), 1, 0, 0)


def read(own: Any, thread: Any, n_threads: Any) -> None:
    """A reader: fill slots until told to stop, or until the system does not give what is wanted.

    Slots: 0 window, 1 the request that failed, which the caller may have read since: then that
    goes on as read (-1: none). The caller tells the two apart by the word that stops.
    """
    window = arg_ptr(own, OWN_WINDOW)
    requests = arg_ptr(window, REQUESTS)
    n = arg_int(window, COUNT)
    take = arg_int(window, TAKE)
    read_address = arg_int(window, READ)
    drop = arg_int(window, DROP)
    late = arg_int(own, OWN_REQUEST)
    if late >= 0:
        atomic_put(requests + late % n * (REQUEST_SLOTS * 8), late // n + 1)
        put_i64(own + OWN_REQUEST * 8, -1)
    going = True
    while going:
        # It fails where a signal comes: then nothing was taken.
        taken = call_system(int_to_ptr(take), arg_int(window, GIVE_TO), -1, 0, 0) & 0xFFFFFFFF == 0
        if atomic_get(window + STOP * 8) != 0:
            going = False
        elif taken:
            q = atomic_add(window + NEXT * 8, 1)
            request = requests + q % n * (REQUEST_SLOTS * 8)
            file = arg_int(request, FILE)
            offset = arg_int(request, OFFSET)
            address = arg_int(request, ADDRESS)
            need = arg_int(request, NEED)
            left = arg_int(request, ASK)
            at = 0
            while at < need and going:
                got = 0
                if read_address != 0:
                    got = call_system(
                        int_to_ptr(read_address), file, address + at, left - at, offset + at
                    )
                if got <= 0:
                    put_i64(own + OWN_REQUEST * 8, q)
                    going = False
                else:
                    at += got
            if going:
                if drop != 0:
                    call_system(int_to_ptr(drop), file, offset, left, DONT_NEED)
                atomic_put(request, q // n + 1)


def kernel() -> Kernel:
    """The row of the reader."""
    return Kernel("window_read", same_for_all(read), (__name__,), no_cases, __name__)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [kernel()]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
