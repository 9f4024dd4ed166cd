"""Operating systems that kernels are linked for: object formats, and how calls pass arguments.

A target file describes a CPU on Linux. `for_system` gives the same CPU on another system: its
triple decides the rest. Only Linux is run and tested; of the others, what is linked is looked at.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from headrace.errors import KernelError
from headrace.targets.target import Target


@dataclass(frozen=True)
class System:
    """A system: the end of its triples ("" keeps the target's), what its libraries are called.

    `architectures` are those that it runs on; None for all.
    """

    triple: str
    suffix: str
    architectures: tuple[str, ...] | None = None


SYSTEMS = {
    "linux": System("", ".so"),
    "macos": System("apple-macosx11.0.0", ".dylib", ("aarch64", "x86_64")),
    "windows": System("pc-windows-msvc", ".dll", ("aarch64", "x86_64")),
}
_HOSTS = {"darwin": "macos", "win32": "windows"}


def host_system() -> str:
    """This machine's system."""
    return _HOSTS.get(sys.platform, "linux")


def exists(target: Target, system: str) -> bool:
    """Are there shared libraries of a target's kernels on a system?"""
    known = SYSTEMS[system].architectures
    if target.architecture == "wasm32" or (known and target.architecture not in known):
        return False
    # Windows' tables for unwinding the stack leave no room for machine code in front of a function.
    return not (system == "windows" and target.guard)


def for_system(target: Target, system: str) -> Target:
    """A target's CPU on a system.

    Raises:
        KernelError: there are no shared libraries for it.
    """
    chosen = SYSTEMS[system]
    if not exists(target, system):
        what = f"{system} on {target.architecture}"
        raise KernelError(f"no shared libraries are built for {what} ({target.name})")
    if not chosen.triple:
        return target
    return replace(target, triple=f"{target.architecture}-{chosen.triple}")


def system_name(target: Target) -> str:
    """The system that a target's triple names."""
    return next((name for name, s in SYSTEMS.items() if s.triple and s.triple in target.triple),
                "linux")  # fmt: skip
