"""Which instructions this CPU has, in LLVM's names: asked of the system, and of LLVM elsewhere."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

from headrace.errors import KernelError
from headrace.targets.host_amx import usable
from headrace.targets.sve_length import host_lengths

# Bits of getauxval, from the kernel's uapi/asm/hwcap.h of each architecture.
_HWCAP, _HWCAP2 = 16, 26
_AARCH64 = {"neon": 1, "fullfp16": 10, "dotprod": 20, "sve": 22}
_AARCH64_2 = {"i8mm": 13}
_ARM = {"neon": 12, "vfp4": 16}
_RISCV = {letter: ord(letter) - ord("a") for letter in "acdfmv"}
# The system call that says more, and bits of its answer (uapi/asm/hwprobe.h).
_RISCV_HWPROBE, _RISCV_EXTENSIONS = 258, 4
_RISCV_MORE = {"zfhmin": 28, "zvfhmin": 31}

# What else architectures are called, by systems and by people, and how LLVM's triples begin.
ARCHITECTURES = {
    "amd64": "x86_64",
    "x64": "x86_64",
    "x86-64": "x86_64",
    "arm64": "aarch64",
    "armv7": "armv7a",
    "armv7l": "armv7a",
    "armv8l": "armv7a",
    "armhf": "armv7a",
    "rv64": "riscv64",
}


def machine() -> str:
    """This process's architecture as LLVM's triples begin."""
    name = platform.machine().lower()
    if sys.maxsize < 1 << 32:  # systems of 64 bits name themselves to programs of 32 as well
        name = {"aarch64": "armv7l", "x86_64": "i686"}.get(name, name)
    return ARCHITECTURES.get(name, name)


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
    return usable(frozenset(name for name, on in llvm.get_host_cpu_features().items() if on))


def _linux(architecture: str) -> frozenset[str] | None:
    try:
        if architecture == "x86_64":
            found = _cpuinfo_flags(Path("/proc/cpuinfo").read_text())
            return None if found is None else usable(found)
        if architecture == "aarch64":
            found = _bits(_HWCAP, _AARCH64) | _bits(_HWCAP2, _AARCH64_2)
            return found | host_lengths() if "sve" in found else found
        if architecture == "armv7a":
            return _bits(_HWCAP, _ARM)
        if architecture == "riscv64":
            found = _bits(_HWCAP, _RISCV)
            lengths = _vector_lengths() if "v" in found else frozenset()
            return (found if lengths else found - {"v"}) | lengths | _probed()
    except (OSError, AttributeError):  # no such file or function
        pass
    return None


def _cpuinfo_flags(text: str) -> frozenset[str] | None:
    """x86: the kernel leaves out what it does not save when it switches threads."""
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            names = {"sse4_1": "sse4.1", "sse4_2": "sse4.2", "pni": "sse3"}
            names["amx_int8"] = "amx-int8"
            return frozenset(names.get(flag, flag.replace("_", "")) for flag in flags.split())
    return None


def _vector_lengths() -> frozenset[str]:
    """RISC-V: the system says that there are vectors, not how long they are."""
    from headrace.targets.vector_length import LENGTHS, host_lengths

    try:
        return host_lengths()
    except OSError:  # no leave to ask: the least
        return frozenset({f"zvl{LENGTHS[0]}b"})


def _probed() -> frozenset[str]:
    """RISC-V: what letters do not say, from Linux 6.8 on; nothing where the system is older."""
    pair = (ctypes.c_int64 * 2)(_RISCV_EXTENSIONS, 0)
    syscall = ctypes.CDLL(None).syscall
    syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, *[ctypes.c_size_t] * 4]
    syscall.restype = ctypes.c_long
    if syscall(_RISCV_HWPROBE, pair, 1, 0, 0, 0) or pair[0] != _RISCV_EXTENSIONS:
        return frozenset()
    return frozenset(name for name, bit in _RISCV_MORE.items() if pair[1] >> bit & 1)


def _bits(kind: int, names: dict[str, int]) -> frozenset[str]:
    libc = ctypes.CDLL(None)
    libc.getauxval.argtypes = [ctypes.c_ulong]
    libc.getauxval.restype = ctypes.c_ulong
    word = libc.getauxval(kind)
    return frozenset(name for name, bit in names.items() if word >> bit & 1)
