"""The machines that kernels are proven on: this CPU, emulators of others, and what they need."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Iterable

from headrace.errors import KernelError
from headrace.targets.emulation import unicorn_user, wasm
from headrace.targets.linker import WASM, find_linker

NATIVE = ""  # this CPU, as a command line: the program as it is
COMPILER = ("numba", "llvmlite")


def command_of(machine: str) -> list[str] | None:
    """The command that runs a machine's programs, [] for this CPU's; None if nothing here does."""
    words = shlex.split(machine)
    if not words or shutil.which(words[0]):
        return words
    return unicorn_user.command(machine)


def short_names(machines: Iterable[str]) -> str:
    """Machines for people, those that differ in a length together: `rv64 VLEN 128, 256`."""
    lengths: dict[str, list[str]] = {}
    for name in map(_short_name, machines):
        front, _, last = name.rpartition(" ")
        if last.isdigit():
            lengths.setdefault(front, []).append(last)
        else:
            lengths[name] = []
    return "; ".join(f"{name} {', '.join(of)}".rstrip() for name, of in lengths.items())


def _short_name(machine: str) -> str:
    """Its CPU, and what of its options tells it from others."""
    *_, options = shlex.split(machine) or [""]
    cpu, *rest = options.split(",")
    values = dict(one.split("=", 1) for one in rest)
    words = [cpu]
    if "vlen" in values:
        words += [*(["Zfh"] if values.get("Zfh") == "true" else []), f"VLEN {values['vlen']}"]
    elif values.get("v") == "false":
        words.append("without vectors")
    if "sve-max-vq" in values:
        words.append(f"SVE {128 * int(values['sve-max-vq'])}")
    elif values.get("sve") == "off":
        words.append("without SVE")
    return " ".join(words)


def why_not(machine: str) -> str | None:
    """What is missing to run kernels on a machine (a command line); None when nothing is."""
    missing = [name for name in COMPILER if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (`pip install {' '.join(missing)}`)"
    if machine == wasm.MACHINE and importlib.util.find_spec("wasmtime") is None:
        return "wasmtime is not installed (`pip install wasmtime`)"
    if machine == NATIVE and not sys.platform.startswith("linux"):
        return "a kernel runs as a program of its own on Linux only"
    if machine != wasm.MACHINE and command_of(machine) is None:
        other = " or `pip install unicorn`" if machine in unicorn_user.MODELS else ""
        emulator = shlex.split(machine)[0]
        package = emulator if emulator.startswith("qemu-system-") else "qemu-user"
        return f"{emulator} is not installed (Debian's package {package}{other})"
    try:
        find_linker(*([WASM] if machine == wasm.MACHINE else []))
    except KernelError as error:
        return str(error)
    return None
