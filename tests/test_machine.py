"""What is known of this machine: a busy minute must not count for longer than it lasts."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import machine
from headrace.kernels import execute, probe
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.team import Team


@pytest.fixture
def unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of which nothing is known."""
    monkeypatch.setattr(machine, "cache_root", lambda: tmp_path)


@pytest.mark.usefixtures("unknown")
def test_the_best_bandwidth_counts() -> None:
    assert machine.known_read_bandwidth("x", 2) is None
    for measured, best in ((20e9, 20e9), (60e9, 60e9), (5e9, 60e9)):
        machine.remember_read_bandwidth("x", 2, measured)
        assert machine.known_read_bandwidth("x", 2) == best
    assert machine.known_read_bandwidth("x", 1) is None


@pytest.mark.usefixtures("unknown")
def test_what_was_measured_in_a_busy_minute_is_measured_again() -> None:
    target = pick_target()
    machine.remember_read_bandwidth(target.name, 1, 1.0)
    store = KernelStore(target)
    team = Team(store.load([*execute.all_kernels(), probe.kernel()]), 1)
    try:
        found = machine.best_read_bandwidth(store, team)
    finally:
        team.close()
    assert found is not None
    assert found > 1e6
    assert machine.known_read_bandwidth(target.name, 1) == found


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("text", ["", "[1]", '{"a": "fast"}', '{"a": -1}', "{"])
def test_a_cache_that_is_broken_is_no_cache(text: str, tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(text)
    assert machine.known_read_bandwidth("x", 2) is None
    machine.remember_read_bandwidth("x", 2, 7e9)
    assert machine.known_read_bandwidth("x", 2) == 7e9
