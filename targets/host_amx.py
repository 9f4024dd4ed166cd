"""Matrix registers of x86 (AMX): Linux lets a process use them when it asks.

Source: Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import ctypes
import sys

SYSTEM_CALL = 158  # arch_prctl of x86-64
ASK, REGISTERS = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, and the number of what is asked for

FEATURES = frozenset({"amx-int8"})


def usable(features: frozenset[str]) -> frozenset[str]:
    """Features without those of AMX where this process may not use them."""
    return features if features & FEATURES == frozenset() or _asked() else features - FEATURES


def _asked() -> bool:
    """Whether the system lets this process use them, now that it is asked."""
    if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32:
        return False
    syscall = ctypes.CDLL(None).syscall
    syscall.argtypes = [ctypes.c_long] * 3
    syscall.restype = ctypes.c_long
    # It refuses where a signal's stack is too small for them, and systems before 5.16 know nothing.
    return bool(syscall(SYSTEM_CALL, ASK, REGISTERS) == 0)
