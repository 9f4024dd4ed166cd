"""Limits of containers: which groups are looked at, and what is read from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import available, cgroups, team
from headrace.cgroups import cgroup_folders


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("membership", "folders"),
    [
        ("0::/", ["."]),
        ("0::/a/b", ["a/b", "a", "."]),
        ("0::/../x", ["."]),
        (
            "12:cpu,cpuacct:/a\n3:memory:/b:c\n1:name=systemd:/x\n0::/u",
            ["cpu/a", "cpu", "u", "."],
        ),
        ("7:cpuset:/a", []),
    ],
)
def test_the_way_to_the_root(root: Path, membership: str, folders: list[str]) -> None:
    write(root, membership=membership)
    assert cgroup_folders("cpu") == [root / folder for folder in folders]


def test_no_groups(root: Path) -> None:
    assert cgroup_folders("cpu") == []
    assert team._quota() is None


def test_a_quota_of_an_inner_group(root: Path) -> None:
    write(root, membership="0::/service/task")
    assert team._quota() is None
    write(root / "service", cpu__max="350000 100000")
    assert team._quota() == 3
    write(root / "service/task", cpu__max="max 100000")
    assert team._quota() == 3
    write(root / "service/task", cpu__max="50000 100000")
    assert team._quota() == 1
    assert team.default_threads() == 1


def test_a_quota_of_version_1(root: Path) -> None:
    write(root, membership="4:cpu,cpuacct:/box")
    write(root / "cpu/box", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert team._quota() is None
    write(root / "cpu", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert team._quota() == 2


def test_the_tightest_memory_limit(root: Path) -> None:
    write(root, membership="0::/a/b")
    # Cache is given back whether it was in use or not, but for what is mapped.
    stat = "inactive_file 20\nactive_file 50\nfile_mapped 40\nanon 5"
    write(root / "a/b", memory__max="max", memory__current="1", memory__stat=stat)
    write(root / "a", memory__max="1000", memory__current="400", memory__stat=stat)
    assert available._cgroup() == 630
