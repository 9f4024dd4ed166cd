"""Which targets can this CPU run?"""

from __future__ import annotations

import platform

from headrace.errors import KernelError
from headrace.targets.target import Target, all_targets
from headrace.targets.vector_length import host_lengths


def host_features() -> frozenset[str]:
    """The features that LLVM sees in this CPU (and that the operating system saves)."""
    import llvmlite.binding as llvm

    found = frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)
    if platform.machine() == "riscv64" and "v" in found:
        found |= host_lengths()  # LLVM says that there are vectors, not how long they are
    return found


def same_architecture(target: Target) -> bool:
    """Is this machine's instruction set the target's?"""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    return target.architecture == machine


def runnable_targets() -> list[Target]:
    """Targets that this CPU can run, the best last."""
    features = host_features()
    return [t for t in all_targets().values() if same_architecture(t) and t.needs <= features]


def pick_target(name: str | None = None) -> Target:
    """The best target for this CPU, or the one asked for.

    Raises:
        KernelError: there is no such target, or this CPU cannot run it.
    """
    runnable = runnable_targets()
    if name is None:
        if not runnable:
            raise KernelError(
                f"no kernels for this CPU ({platform.machine()}); "
                f"targets: {', '.join(all_targets())}"
            )
        return runnable[-1]
    targets = all_targets()
    if name not in targets:
        raise KernelError(f"unknown target {name!r}; targets: {', '.join(targets)}")
    target = targets[name]
    if target not in runnable:
        missing = sorted(target.needs - host_features())
        raise KernelError(
            f"this CPU cannot run {name}: it lacks {', '.join(missing) or 'the architecture'}; "
            f"it runs {', '.join(t.name for t in runnable)}"
        )
    return target
