"""Instructions per multiply-add do not grow: compared with `instructions.json`.

`pytest tests/emulated --update-instructions` writes what it counts to that table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign import MOST, param
from targets_here import WHOLE

from headrace.costs import OPERATIONS, cost, machine_for
from headrace.sparse.registry import FORMATS
from headrace.targets.host import runnable_targets
from headrace.targets.target import all_targets

PATH = Path(__file__).with_name("instructions.json")
TABLE: dict[str, dict[str, float]] = json.loads(PATH.read_text())
SLACK = 1.01  # versions of the compiler that the package allows differ by so much
# Counted by CI, for the targets that it tests most of.
PART = ("q4_0",)
# For this CPU's own besides, where that is cheap: sums of single blocks, and of chunks in a block,
# whose loops say first whether LLVM unrolls what it should and keeps sums in registers.
LOOPS = ("f32", "i3_g64")

ALL = all_targets()
COUNTED = {**dict.fromkeys(MOST, PART), **dict.fromkeys(WHOLE, (*PART, *LOOPS))}  # by CI


def rows() -> list[Any]:
    native = {target.name for target in runnable_targets()}
    return [
        param(
            target,
            machine_for(target),
            operation,
            fmt,
            slow=fmt not in COUNTED.get(target.name, ()),
        )
        for target in ALL.values()
        if target.name in native or target.machines
        for operation in OPERATIONS
        for fmt in FORMATS
    ]


@pytest.mark.parametrize(("target_name", "machine", "operation", "format_name"), rows())
def test_instructions_per_multiply_add(
    target_name: str,
    machine: str,
    operation: str,
    format_name: str,
    request: pytest.FixtureRequest,
) -> None:
    found = cost(ALL[target_name], operation, format_name).instructions
    kernel = f"{operation}_{format_name}"
    if request.config.option.update_instructions:
        TABLE.setdefault(target_name, {})[kernel] = round(found, 4)
        PATH.write_text(json.dumps(TABLE, indent=1, sort_keys=True) + "\n")
        return
    known = TABLE[target_name][kernel]
    assert found <= known * SLACK, f"{kernel} of {target_name}: {found:.4f}, was {known}"
