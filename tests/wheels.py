"""Build the package's wheel from a copy of its sources, and install it where nothing else is."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("runtime", "loaders", "sparse", "offload", "targets")
COMPILER = ("numba", "llvmlite")


def copy_sources(folder: Path) -> None:
    """Copy what a wheel is built from, without kernel packs."""
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        source, copy = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "packs"))
        else:
            shutil.copy(source, copy)


def build_wheel(folder: Path, packs: Iterable[tuple[str, Path]] = ()) -> Path:
    """Build the wheel in an empty folder, with (architecture, folder) kernel packs inside."""
    copy_sources(folder)
    for architecture, pack in packs:
        shutil.copytree(pack, folder / "targets" / "packs" / architecture)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."],
        cwd=folder, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").iterdir()
    return wheel


def needed(name: str, without: Iterable[str]) -> dict[str, str]:
    """What a distribution needs here, all the way down, with the versions that are installed."""
    found: dict[str, str] = {}
    left = {canonicalize_name(one) for one in without}
    todo = [canonicalize_name(name)]
    while todo:
        for line in importlib.metadata.requires(todo.pop()) or ():
            wanted = Requirement(line)
            one = canonicalize_name(wanted.name)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if applies and one not in left and one not in found:
                found[one] = importlib.metadata.version(one)
                todo.append(one)
    return found
