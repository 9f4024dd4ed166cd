"""The machines that kernels are proven on: this CPU, emulators of others, and what they need."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys

from headrace.errors import KernelError
from headrace.targets.emulation import wasm
from headrace.targets.linker import WASM, find_linker

NATIVE = ""  # this CPU, as a command line: the program as it is
COMPILER = ("numba", "llvmlite")


def why_not(machine: str) -> str | None:
    """What is missing to run kernels on a machine (a command line); None when nothing is."""
    missing = [name for name in COMPILER if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (`pip install {' '.join(missing)}`)"
    if machine == wasm.MACHINE and importlib.util.find_spec("wasmtime") is None:
        return "wasmtime is not installed (`pip install wasmtime`)"
    if machine == NATIVE and not sys.platform.startswith("linux"):
        return "a kernel runs as a program of its own on Linux only"
    emulator = shlex.split(machine)[:1] if machine != wasm.MACHINE else []
    if emulator and shutil.which(emulator[0]) is None:
        return f"{emulator[0]} is not installed (Debian's package qemu-user)"
    try:
        find_linker(*([WASM] if machine == wasm.MACHINE else []))
    except KernelError as error:
        return str(error)
    return None
