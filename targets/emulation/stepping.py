"""Count a native program's instructions by single steps: CPUs of virtual machines hide counters."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from collections.abc import Sequence

from headrace.errors import KernelError
from headrace.targets.features import machine

_TRACEME, _PEEKUSER, _SINGLESTEP = 0, 3, 9
_RIP = 16 * 8  # in struct user of x86-64


def count_steps(command: Sequence[str], data: bytes, low: int, high: int) -> tuple[int, bytes]:
    """How many instructions in low <= address < high run, and what the program writes (x86-64).

    Raises:
        KernelError: the program cannot be traced, or it fails.
    """
    if machine() != "x86_64":
        raise KernelError("single steps are counted on x86-64 only: an emulator counts elsewhere")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(data)
        stdin.seek(0)
        child = os.fork()
        if child == 0:
            try:
                os.dup2(stdin.fileno(), 0)
                os.dup2(stdout.fileno(), 1)
                if libc.ptrace(_TRACEME, 0, None, None) == 0:
                    os.execv(command[0], list(command))
            finally:
                os._exit(127)
        count = 0
        _, status = os.waitpid(child, 0)
        while os.WIFSTOPPED(status):
            if os.WSTOPSIG(status) != signal.SIGTRAP:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise KernelError(f"{command[0]} stopped at signal {os.WSTOPSIG(status)}")
            # No address of ours has its upper half set, so -1 is an error and not a value.
            at = libc.ptrace(_PEEKUSER, child, _RIP, None)
            count += low <= at < high
            libc.ptrace(_SINGLESTEP, child, None, None)
            _, status = os.waitpid(child, 0)
        if status:
            raise KernelError(f"{command[0]} cannot be traced: status {status}")
        stdout.seek(0)
        return count, stdout.read()
