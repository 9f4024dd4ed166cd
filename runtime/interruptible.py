"""Run native work where Ctrl-C stays what it is."""

from __future__ import annotations

import _thread
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
        on_interrupt: called when the wait is interrupted (KeyboardInterrupt, or what else a signal
            handler raises); `work` should then end soon, and is waited for, whatever interrupts
            come on top. Without it `work` is left to end by itself.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    # A lock and a list, as an interrupt inside of `threading.Event` breaks it.
    ended, bell = list[bool](), threading.Lock()
    bell.acquire()
    # Whose turn it is: the thread's, or, when it was interrupted before it got to run, ours. Who
    # asks first decides, in one step that no signal divides.
    turn: dict[str, str] = {}

    def body() -> None:
        try:
            if turn.setdefault("of", "work") == "work":
                results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.append(True)
            bell.release()

    try:
        # Not `threading.Thread`, whose start an interrupt can leave half done.
        _thread.start_new_thread(body, ())
        while not ended:
            bell.acquire(timeout=0.1)
    except BaseException:
        if on_interrupt is not None and turn.setdefault("of", "caller") == "work":
            end = on_interrupt

            def wait() -> None:
                end()
                bell.acquire(timeout=0.1)

            persist(wait, lambda: bool(ended))
        raise
    if errors:
        raise errors[0]
    return results[0]


def undisturbed(work: Callable[[], T]) -> T:
    """Do `work` to its end, whatever interrupts come meanwhile; the first is raised afterwards.

    For what must not be cut off between two instructions: memory that changes hands, threads that
    begin. An interrupt that comes before it has begun leaves it undone.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # no signal gets here
    return run_aside(work, on_interrupt=lambda: None)


def persist(step: Callable[[], object], over: Callable[[], bool]) -> None:
    """Repeat `step` until `over`, through all interrupts; the first of them is raised at the end.

    For what must not be left half done: memory that a thread still uses, threads to be joined. An
    interrupt is whatever a signal handler raises; `step` itself must not fail.
    """
    interrupt: BaseException | None = None
    while not over():
        try:
            while not over():
                step()
        except BaseException as error:
            interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt
