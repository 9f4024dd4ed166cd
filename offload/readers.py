"""Native threads that read files, from their start to their end."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import HeadraceError
from headrace.interruptible import persist, undisturbed
from headrace.offload.semaphore import Semaphore
from headrace.targets.table import ENTRY

PATIENCE_PAUSES = 2_000
_NAP_US, _NAP_MS = 50, 1


@dataclass(frozen=True)
class Words:
    """Where readers and those who wait for them look.

    Attributes:
        shared: int64, of all.
        stop, failed: of these, the word that ends readers, and the one that says that a read failed
            for good.
        late: of a reader's own words, the number of the read that the system did not make (-1:
            none); the caller makes it, and the reader goes on behind it.
    """

    shared: np.ndarray
    stop: int
    failed: int
    late: int


class Readers:
    """Threads that run one kernel.

    Args:
        kernel: its address; its argument block is a reader's own words.
        words: where they look.
        read_again: makes the read that a reader, by its own words, could not make, or raises why.
        name: of the threads.

    Attributes:
        error: what ended one of them.
    """

    def __init__(
        self, kernel: int, words: Words, read_again: Callable[[np.ndarray], None], name: str
    ) -> None:
        self._kernel = ENTRY(kernel)
        self._words = words
        self._read_again = read_again
        self._name = name
        self._semaphore: Semaphore | None = None
        self._threads: list[threading.Thread] = []
        self.error: BaseException | None = None

    @property
    def going(self) -> bool:
        """Whether they run, and go on."""
        return self._semaphore is not None and self._words.shared[self._words.stop] == 0

    def start(self, permits: int, prepare: Callable[[Semaphore], Sequence[np.ndarray]]) -> None:
        """Start them, or fewer than wanted where there are no more threads.

        Args:
            permits: that the semaphore has at first.
            prepare: says all that readers look at, and gives the own words of each.

        Raises:
            HeadraceError: the system gives no thread.
        """
        self.halt()  # if an interrupt came when they were to end
        try:
            undisturbed(lambda: self._start(permits, prepare))
        except RuntimeError as error:  # no more threads, or no room for their stacks
            raise HeadraceError(
                "the system gives no thread to read with: end other programs, or raise the "
                "limits of this process (`ulimit -u`, `ulimit -v`)"
            ) from error

    def _start(self, permits: int, prepare: Callable[[Semaphore], Sequence[np.ndarray]]) -> None:
        semaphore = Semaphore(permits)
        all_own = prepare(semaphore)
        self.error = None
        self._semaphore, self._threads = semaphore, []
        for i, own in enumerate(all_own):
            thread = threading.Thread(
                target=self._serve, args=(own,), name=f"{self._name}-{i}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    self._semaphore = None
                    semaphore.close()
                    raise
                break  # fewer will do
            self._threads.append(thread)

    def _serve(self, own: np.ndarray) -> None:
        try:
            while True:
                self._kernel(own.ctypes.data, 0, 1)
                # Once all are to end, what this one could not read is not wanted any more.
                if int(own[self._words.late]) < 0 or self._words.shared[self._words.stop]:
                    return
                self._read_again(own)
        except BaseException as error:
            if self.error is None:
                self.error = error
            self._words.shared[self._words.failed] = 1

    def halt(self) -> None:
        """End them."""
        semaphore = self._semaphore
        if semaphore is None:
            return
        self._words.shared[self._words.stop] = 1
        if sys.is_finalizing():
            semaphore.post(len(self._threads))
            return  # the threads cannot come back to Python to be joined
        posted: list[bool] = []

        def stop() -> None:
            # Once more where an interrupt came: too many permits do no harm.
            semaphore.post(len(self._threads))
            posted.append(True)
            for thread in self._threads:
                thread.join()

        persist(stop, lambda: bool(posted) and not any(t.is_alive() for t in self._threads))
        self._threads = []
        self._semaphore = None
        semaphore.close()


@dataclass(frozen=True)
class SystemFunctions:
    """Addresses of functions of the operating system; 0: it has none."""

    read: int
    nap: int
    nap_for: int
    drop: int


def system_functions() -> SystemFunctions:
    """Those of this one."""

    def find(library: Any, *names: str) -> int:
        for name in names:
            function = getattr(library, name, None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
        return 0

    if sys.platform == "win32":
        # Without a read at an offset that native threads could call, those of Python read.
        return SystemFunctions(0, find(ctypes.WinDLL("kernel32"), "Sleep"), _NAP_MS, 0)
    library = ctypes.CDLL(None)
    wide = ctypes.sizeof(ctypes.c_void_p) == 8
    return SystemFunctions(
        read=find(library, "pread") if wide else find(library, "pread64"),
        nap=find(library, "usleep"),
        nap_for=_NAP_US,
        drop=find(library, "posix_fadvise") if wide and hasattr(os, "posix_fadvise") else 0,
    )
