"""Jobs that several threads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from headrace.interruptible import persist

_J = TypeVar("_J")


def share(
    jobs: Iterable[_J], work: Callable[[_J], None], n_threads: int, report: Callable[[], None]
) -> None:
    """Do `work` for each job on `n_threads` threads: this one, which reports as well, and others.

    What goes wrong anywhere is raised here, when no thread is at work any more. (A
    ThreadPoolExecutor would do, but takes 3 ms to import.)
    """
    lock, rest, errors = threading.Lock(), iter(jobs), list[BaseException]()
    at_work: set[int] = set()  # of the others

    def some(after: Callable[[], None]) -> None:
        try:
            while not errors:
                with lock:
                    job = next(rest, None)
                if job is None:
                    return
                work(job)
                after()
        except BaseException as error:
            errors.append(error)

    def other(index: int) -> None:
        at_work.add(index)  # first of all, then `some` looks for errors
        some(lambda: None)
        at_work.discard(index)

    others = [threading.Thread(target=other, args=(i,), daemon=True) for i in range(n_threads - 1)]
    try:
        for thread in others:
            thread.start()
        some(report)
        for thread in others:
            thread.join()
    except BaseException as error:  # Ctrl-C, maybe with a thread half started
        errors.append(error)
        persist(lambda: time.sleep(0.001), lambda: not at_work)
    if errors:
        raise errors[0]
