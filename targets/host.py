"""Which targets can this CPU run?"""

from __future__ import annotations

import platform
from collections.abc import Collection

from headrace.errors import KernelError
from headrace.targets.features import host_features, machine
from headrace.targets.systems import for_system, host_system
from headrace.targets.target import Target, all_targets, hint_at_chips


def same_architecture(target: Target) -> bool:
    """Is this machine's instruction set the target's?"""
    return target.architecture == machine()


def runnable_targets() -> list[Target]:
    """Targets that this CPU can run, the best last."""
    features = host_features()
    mine = [t for t in all_targets().values() if same_architecture(t) and t.needs <= features]
    return [for_system(target, host_system()) for target in mine]


def pick_target(name: str | None = None, among: Collection[str] | None = None) -> Target:
    """The best target for this CPU, or the one asked for.

    Args:
        name: the target asked for; None for the best.
        among: names of the targets that there are kernels for; None for all.

    Raises:
        KernelError: there is no such target, or this CPU cannot run it.
    """
    targets = {n: t for n, t in all_targets().items() if among is None or n in among}
    runnable = {target.name: target for target in runnable_targets() if target.name in targets}
    if name is None:
        if not runnable:
            raise KernelError(
                f"no kernels for this CPU ({platform.machine()}); targets: {', '.join(targets)}"
            )
        return list(runnable.values())[-1]
    if name not in targets:
        what = "there are no kernels for the" if name in all_targets() else "unknown"
        raise KernelError(
            f"{hint_at_chips(name)}{what} target {name!r}; targets: {', '.join(targets) or 'none'}"
        )
    if name not in runnable:
        missing = sorted(targets[name].needs - host_features())
        raise KernelError(
            f"this CPU cannot run {name}: it lacks {', '.join(missing) or 'the architecture'}; "
            f"it runs {', '.join(runnable)}"
        )
    return runnable[name]
