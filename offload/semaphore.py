"""A counting semaphore of the operating system, for native threads: two functions and a handle."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from headrace.errors import HeadraceError

_BYTES = 128  # more than any system's sem_t


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Semaphore:
    """`value` permits at first.

    Attributes:
        take, give: addresses of functions of (handle, -1) and (handle, 1, 0), which wait for a
            permit and give one; 0 means done (`take` may be interrupted by a signal instead).
        handle: their first argument.

    Raises:
        HeadraceError: the system has none, or no more of them.
    """

    def __init__(self, value: int) -> None:
        self._keep: Any = None
        self._open = True
        try:
            if sys.platform == "win32":
                system = ctypes.WinDLL("kernel32", use_last_error=True)
                system.CreateSemaphoreW.restype = ctypes.c_void_p
                self.handle = system.CreateSemaphoreW(None, value, 0x7FFFFFFF, None) or 0
                self.take = _address(system.WaitForSingleObject)
                self.give = _address(system.ReleaseSemaphore)
            elif sys.platform == "darwin":  # it has no nameless POSIX ones
                system = ctypes.CDLL(None)
                system.dispatch_semaphore_create.restype = ctypes.c_void_p
                system.dispatch_semaphore_create.argtypes = [ctypes.c_long]
                # Releasing one with fewer permits than at first ends the process: none at first.
                self.handle = system.dispatch_semaphore_create(0) or 0
                self.take = _address(system.dispatch_semaphore_wait)
                self.give = _address(system.dispatch_semaphore_signal)
            else:
                system = ctypes.CDLL(None, use_errno=True)
                self._keep = ctypes.create_string_buffer(_BYTES)
                self.handle = ctypes.addressof(self._keep)
                if system.sem_init(self._keep, 0, value):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                self.take, self.give = _address(system.sem_wait), _address(system.sem_post)
        except (OSError, AttributeError) as error:
            raise HeadraceError(f"the system gives no semaphore: {error}") from error
        if not self.handle:
            raise HeadraceError("the system gives no semaphore")
        self._system = system
        if sys.platform == "darwin":
            self.post(value)

    def post(self, n: int) -> None:
        """Give n permits."""
        call = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
        )(self.give)  # fmt: skip
        for _ in range(n):
            call(self.handle, 1, 0)

    def close(self) -> None:
        """Give it back to the system; nobody may be waiting."""
        if self._open:
            self._open = False
            if sys.platform == "win32":
                self._system.CloseHandle(ctypes.c_void_p(self.handle))
            elif sys.platform == "darwin":
                self._system.dispatch_release(ctypes.c_void_p(self.handle))
            else:
                self._system.sem_destroy(self._keep)
