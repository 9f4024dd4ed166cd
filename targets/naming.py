"""Which targets somebody means who names an architecture, a target, a system or a CPU."""

from __future__ import annotations

from collections.abc import Collection

from headrace.errors import KernelError
from headrace.targets.cpus import GENERIC, features_of
from headrace.targets.features import ARCHITECTURES
from headrace.targets.systems import SYSTEMS, exists, for_system
from headrace.targets.target import Target, hint_at_chips


def choose(targets: Collection[Target], what: str, cpu: str | None) -> list[Target]:
    """The targets that `headrace targets build --target WHAT --cpu CPU` means, the best last.

    Args:
        targets: what there is.
        what: a target's name or an architecture, and a system, such as "aarch64-linux",
            "arm64-macos" or "x86-64-v3-windows"; without a system, targets as they are.
        cpu: a CPU (see `headrace.targets.cpus`): the levels that it cannot run are left out; of
            "generic", all but the lowest.

    Raises:
        KernelError: there is nothing of that name, no shared library for it, or nothing that the
            CPU runs.
    """
    named = _named(targets, what.lower())
    if cpu is None:
        return named
    cpu = cpu.lower()
    if cpu in GENERIC:
        return named[:1]
    features = features_of(cpu, named[0].architecture)
    fitting = [target for target in named if target.needs <= features]
    if not fitting:
        lacking = ", ".join(sorted(named[0].needs - features))
        raise KernelError(f"{cpu} cannot run {named[0].name}: it lacks {lacking}")
    return fitting


def choose_one(targets: Collection[Target], what: str, cpu: str | None) -> Target:
    """The one target that code is made for which cannot choose when it runs.

    That is the best one for `cpu`, or without it the level that every CPU of an architecture has.

    Raises:
        KernelError: as `choose`.
    """
    fitting = choose(targets, what, cpu)
    return fitting[0] if cpu is None else fitting[-1]


def _named(targets: Collection[Target], what: str) -> list[Target]:
    base, _, system = what.rpartition("-")
    if system not in SYSTEMS:
        base, system = what, ""
    architecture = ARCHITECTURES.get(base, base)
    by_name = [target for target in targets if target.name == base]
    by_architecture = [target for target in targets if target.architecture == architecture]
    # "riscv64" is both: with a system, it is the architecture.
    named = by_architecture or by_name if system else by_name or by_architecture
    if not named:
        names = sorted({target.architecture for target in targets})
        raise KernelError(
            f"{hint_at_chips(what)}unknown target {what!r}; architectures: {', '.join(names)}; "
            f"targets: {', '.join(target.name for target in targets)}; behind either may stand "
            f"{', '.join(f'-{name}' for name in SYSTEMS)}"
        )
    if system:  # of an architecture, the levels that are built for the system
        named = [target for target in named if exists(target, system)] or named[:1]
        named = [for_system(target, system) for target in named]
    return sorted(named, key=lambda target: target.rank)
