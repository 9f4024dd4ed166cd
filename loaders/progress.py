"""Progress reports of a download, and what goes wrong in the caller's own code that gets them."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, "int | None", str], None]
"""Called with (bytes done, bytes in all or None, what is going on)."""


class CallbackError(Exception):
    """What a caller's progress callback raised, kept apart from errors of the work itself."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


def guarded(progress: Progress | None) -> Progress:
    """`progress`, or one that does nothing; what it raises comes as `CallbackError`.

    A callback may fail as a disk or a network does, with OSError: whoever explains such errors must
    not take it for theirs, and lets `CallbackError.error` through as it is.
    """

    def report(done: int, total: int | None, label: str) -> None:
        if progress is None:
            return
        try:
            progress(done, total, label)
        except Exception as error:
            raise CallbackError(error) from error

    return report
