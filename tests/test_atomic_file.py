"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.atomic_file import publish, whole_file, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_appears_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle)))
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with whole_file(target, durable=durable) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]
    # The contents, and where there is such a thing, the directory.
    assert len(synced) == (2 if os.name == "posix" else 1) * durable


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), whole_file(target) as file:
        file.write(b"x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_check_may_refuse(tmp_path: Path) -> None:
    def refuse() -> None:
        raise FileExistsError

    with pytest.raises(FileExistsError), whole_file(tmp_path / "a", check=refuse) as file:
        file.write(b"x")
    assert names(tmp_path) == []


def test_bytes_at_once(tmp_path: Path) -> None:
    target = tmp_path / "b" / "c" / ("n" * 255)
    write_whole(target, b"data")
    assert target.read_bytes() == b"data"
    assert names(target.parent) == [target.name]


def test_publish(tmp_path: Path) -> None:
    part, target = tmp_path / "part", tmp_path / "whole"
    part.write_bytes(b"x")
    publish(part, target)
    assert names(tmp_path) == ["whole"]
    with pytest.raises(FileNotFoundError):
        publish(part, target)
