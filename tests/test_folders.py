"""Where the cache is, and what is said when it cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.folders import cache_root, why_unusable


@pytest.mark.parametrize(
    ("value", "expected"),
    [("/x/y", "/x/y"), (" /x/y ", "/x/y"), ("~/z", "HOME/z"), ("rel", "rel")],
)
def test_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("HEADRACE_CACHE", value)
    assert cache_root() == Path(expected.replace("HOME", str(tmp_path)))


@pytest.mark.parametrize("variable", ["", "  "])
@pytest.mark.parametrize("xdg", ["", "/x/cache", "relative"])
def test_the_default_is_that_of_platformdirs(
    monkeypatch: pytest.MonkeyPatch, variable: str, xdg: str
) -> None:
    from platformdirs import user_cache_dir

    monkeypatch.setenv("HEADRACE_CACHE", variable)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_root() == Path(user_cache_dir("headrace", appauthor=False))


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    assert why_unusable(tmp_path) == ""
    assert why_unusable(tmp_path / "not/yet/there") == ""
    (tmp_path / "file").touch()
    for folder in ("file", "file/models/x"):
        assert why_unusable(tmp_path / folder).startswith(f"{tmp_path / 'file'} is not a directory")
        assert "HEADRACE_CACHE" in why_unusable(tmp_path / folder)
    (tmp_path / "link").symlink_to("gone")
    assert "link is not a directory" in why_unusable(tmp_path / "link" / "models")


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed)  # root may write anywhere
    assert "closed is not writable" in why_unusable(closed / "models")
