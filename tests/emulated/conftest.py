"""Skip what no emulator, linker or CPU is here for, and say what is missing."""

from __future__ import annotations

import pytest

from headrace.targets.emulation.machines import why_not


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("target"):
        _, machine = mark.args
        if missing := why_not(machine):
            pytest.skip(missing)
