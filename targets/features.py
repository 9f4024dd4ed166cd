"""Which instructions this CPU has, in LLVM's names: asked of the system, and of LLVM elsewhere."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

from headrace.errors import KernelError
from headrace.targets.sve_length import host_lengths

# Bits of getauxval, from the kernel's uapi/asm/hwcap.h of each architecture.
_HWCAP, _HWCAP2 = 16, 26
_AARCH64 = {"neon": 1, "fullfp16": 10, "dotprod": 20, "sve": 22, "fp16fml": 23}
_AARCH64_2 = {"sve2": 1, "i8mm": 13, "bf16": 14}
_ARM = {"fp16": 1, "neon": 12, "vfp4": 16}
_RISCV = {letter: ord(letter) - ord("a") for letter in "acdfimv"}


def machine() -> str:
    """This machine's architecture as LLVM's triples begin."""
    name = platform.machine().lower()
    known = {"amd64": "x86_64", "arm64": "aarch64", "armv7l": "armv7a", "armv8l": "armv7a"}
    return known.get(name, name)


@cache
def host_features() -> frozenset[str]:
    """Features of this CPU that the system lets programs use.

    Raises:
        KernelError: neither the system nor LLVM tells.
    """
    if sys.platform.startswith("linux"):
        found = _linux(machine())
        if found is not None:
            return found
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise KernelError(
            f"cannot tell what this CPU ({platform.machine()}) has: install llvmlite"
        ) from error
    return frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)


def _linux(architecture: str) -> frozenset[str] | None:
    try:
        if architecture == "x86_64":
            return _cpuinfo_flags(Path("/proc/cpuinfo").read_text())
        if architecture == "aarch64":
            found = _bits(_HWCAP, _AARCH64) | _bits(_HWCAP2, _AARCH64_2)
            return found | host_lengths() if "sve" in found else found
        if architecture == "armv7a":
            return _bits(_HWCAP, _ARM)
        if architecture == "riscv64":
            found = _bits(_HWCAP, _RISCV)
            return found | _vector_lengths() if "v" in found else found
    except (OSError, AttributeError):  # no such file or function
        pass
    return None


def _cpuinfo_flags(text: str) -> frozenset[str] | None:
    """x86: the kernel leaves out what it does not save when it switches threads."""
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            dotted = {"sse4_1": "sse4.1", "sse4_2": "sse4.2", "pni": "sse3"}
            return frozenset(dotted.get(flag, flag.replace("_", "")) for flag in flags.split())
    return None


def _vector_lengths() -> frozenset[str]:
    """RISC-V: the system says that there are vectors, not how long they are."""
    from headrace.targets.vector_length import host_lengths

    try:
        return host_lengths()
    except ImportError:  # no LLVM to build the kernel that asks: 128 bits are the least
        return frozenset({"zvl128b"})


def _bits(kind: int, names: dict[str, int]) -> frozenset[str]:
    libc = ctypes.CDLL(None)
    libc.getauxval.argtypes = [ctypes.c_ulong]
    libc.getauxval.restype = ctypes.c_ulong
    word = libc.getauxval(kind)
    return frozenset(name for name, bit in names.items() if word >> bit & 1)
