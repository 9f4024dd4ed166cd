"""What `headrace targets list` shows."""

from __future__ import annotations

from typing import Any

from headrace.target_test import kernels_for
from headrace.targets.emulation.machines import short_names, why_not
from headrace.targets.features import host_features
from headrace.targets.host import runnable_targets, same_architecture
from headrace.targets.target import Target, all_targets, microcontrollers

_HERE = "this CPU"


def describe_targets() -> list[dict[str, Any]]:
    """A row for each target: what it is built for, and where its kernels can be proven here.

    Every kernel of the table is built for every CPU, so "kernels" is the same for all, and
    microcontrollers have a table of their own; `tests/test_kernels.py` proves them on this CPU and
    `tests/emulated` on emulated ones.
    "provable_on" are command lines of emulators, or this CPU, or nothing: then "why_not" says what
    is missing. "best_here": the target that this CPU chooses.
    """
    here = [target.name for target in runnable_targets()]
    rows = []
    for target in (*all_targets().values(), *microcontrollers().values()):
        provable_on, missing = _provable(target, here)
        rows.append(
            {
                "target": target.name,
                "triple": target.triple,
                "cpu": target.cpu,
                "features": target.features,
                "needs": " ".join(sorted(target.needs)),
                "kernels": len(kernels_for(target)),
                "provable_on": provable_on,
                "why_not": missing,
                "best_here": target.name in here[-1:],
            }
        )
    return rows


def for_people(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a table that fits a terminal: short names, LLVM's options left out."""
    return [
        {
            **{key: row[key] for key in ("target", "triple", "cpu", "kernels")},
            "provable_on": _where(row),
            "needs": row["needs"],
        }
        for row in rows
    ]


def _where(row: dict[str, Any]) -> str:
    if row["provable_on"] == [_HERE]:
        return _HERE + (", its best" if row["best_here"] else "")
    return short_names(row["provable_on"]) or f"not here: {row['why_not']}"


def _provable(target: Target, here: list[str]) -> tuple[list[str], str | None]:
    if target.name in here:
        return [_HERE], None
    if same_architecture(target):
        return [], "this CPU lacks " + ", ".join(sorted(target.needs - host_features()))
    missing = {machine: why_not(machine) for machine in target.machines}
    runs = [machine for machine, reason in missing.items() if reason is None]
    return runs, None if runs else next(iter(missing.values()))
