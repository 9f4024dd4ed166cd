"""Run native work where Ctrl-C stays what it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_aside(work: Callable[[], T], on_interrupt: Callable[[], None] | None = None) -> T:
    """Run `work` in a thread of its own and wait for it; signals reach the main thread meanwhile.

    Python delivers Ctrl-C only between its own instructions in the main thread: during a long
    native call it would come late, and an extension that drops exceptions would lose it.

    Args:
        work: what to do; its result is returned and its exception raised.
        on_interrupt: called when the wait is interrupted (KeyboardInterrupt); `work` should then
            end soon, and is waited for. Without it `work` is left to end by itself.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    finished = threading.Event()
    taken = threading.Event()

    def body() -> None:
        taken.set()
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=body, name="headrace-aside", daemon=True)
    try:
        thread.start()
        while not finished.wait(0.1):
            pass
    except BaseException:
        if on_interrupt is not None:
            on_interrupt()
            # The interrupt may have come before the thread ran: give it a moment to begin.
            while taken.wait(0.2) and not finished.wait(0.1):
                on_interrupt()
        raise
    if errors:
        raise errors[0]
    return results[0]
