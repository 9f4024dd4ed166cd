"""Sharing the work of loading among threads, and ending it early."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from headrace.share import share


def nothing() -> None:
    pass


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_every_job_is_done_once(n_threads: int) -> None:
    done: list[Any] = []
    reports: list[int] = []
    jobs: Any = range(200)
    share(jobs, done.append, n_threads, lambda: reports.append(1))
    assert sorted(done) == list(range(200))
    assert len(reports) <= 200  # this thread's share


def test_an_error_ends_all() -> None:
    def work(job: Any) -> None:
        if job == 5:
            raise ZeroDivisionError
        time.sleep(0.001)

    jobs: Any = iter(range(10**9))
    with pytest.raises(ZeroDivisionError):
        share(jobs, work, 3, nothing)


@pytest.mark.parametrize("began", [True, False])
def test_an_interrupt_while_threads_start(monkeypatch: pytest.MonkeyPatch, began: bool) -> None:
    """No thread reads after `_share`: what they read from is closed then."""
    start, started = threading.Thread.start, list[threading.Thread]()
    reading, over, late = threading.Event(), threading.Event(), list[Any]()

    def interrupt(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 1:
            start(thread)
            assert reading.wait(10)
            return
        if began:
            start(thread)
        raise KeyboardInterrupt

    def work(job: Any) -> None:
        reading.set()
        time.sleep(0.2)
        if over.is_set():
            late.append(job)

    monkeypatch.setattr(threading.Thread, "start", interrupt)
    jobs: Any = range(100)
    with pytest.raises(KeyboardInterrupt):
        share(jobs, work, 4, nothing)
    over.set()
    if not began:
        start(started[-1])  # as if it had only been slow
    for thread in started:
        thread.join()
    assert late == []
