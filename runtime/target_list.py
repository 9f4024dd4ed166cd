"""What `headrace targets list` shows."""

from __future__ import annotations

from typing import Any

from headrace.kernels.table import kernel_table
from headrace.targets.emulation.machines import why_not
from headrace.targets.features import host_features
from headrace.targets.host import runnable_targets, same_architecture
from headrace.targets.target import all_targets


def describe_targets() -> list[dict[str, Any]]:
    """A row for each target: what it is built for, and where its kernels can be proven here.

    Every kernel of the table is built for every target; `tests/test_kernels.py` proves them on this
    CPU and `tests/emulated` on emulated ones.
    """
    here = [target.name for target in runnable_targets()]
    n_kernels = len(kernel_table())
    rows = []
    for target in all_targets().values():
        if target.name in here:
            proof = "this CPU" + (", its best" if target.name == here[-1] else "")
        elif same_architecture(target):
            proof = "not here: this CPU lacks " + ", ".join(sorted(target.needs - host_features()))
        else:
            proof = _emulated(target.machines)
        rows.append(
            {
                "target": target.name,
                "triple": target.triple,
                "cpu": target.cpu,
                "features": target.features,
                "needs": " ".join(sorted(target.needs)),
                "kernels": n_kernels,
                "proof": proof,
            }
        )
    return rows


def _emulated(machines: tuple[str, ...]) -> str:
    missing = {machine: why_not(machine) for machine in machines}
    runs = [machine for machine, reason in missing.items() if reason is None]
    if runs:
        return "emulated: " + "; ".join(runs)
    return next((f"not here: {reason}" for reason in missing.values()), "none yet")
