"""The manifest of a kernel pack: a file of JSON that says which libraries there are."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import KernelError
from headrace.targets.systems import SYSTEMS, system_name
from headrace.targets.target import Target

MANIFEST = "manifest.json"
# How kernels find their arguments and lay out weights; a pack of another version is refused.
LAYOUT = 1
MANIFEST_BYTES = 1 << 20
_PREFIX = "headrace-"  # of the libraries' names


@dataclass(frozen=True)
class Level:
    """The kernels of one target in a pack: the library's file and hash, the kernels' keys."""

    file: str
    sha256: str
    triple: str
    kernels: dict[str, str]


def _read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says, of whatever layout.

    Raises:
        KernelError: there is none, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES + 1)
    except OSError as error:
        raise KernelError(f"{path.parent} is no kernel pack: {path}: {error.strerror}") from error
    if len(data) > MANIFEST_BYTES:
        raise _no_manifest(path, "it is too large")
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _no_manifest(path, "it is not JSON") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("targets"), dict):
        raise _no_manifest(path, 'it lacks "targets"')
    return manifest


def read_levels(folder: Path) -> dict[str, Level]:
    """What the pack in a folder has, by target.

    Raises:
        KernelError: there is none, its manifest is damaged, or it is of another layout.
    """
    path = folder / MANIFEST
    manifest = _read_manifest(path)
    layout = manifest.get("layout")
    if layout != LAYOUT:
        said = json.dumps(layout) if isinstance(layout, int | str) else "not said"
        raise KernelError(
            f"{path}: the pack's layout is {said}, this release's {LAYOUT}: build it again "
            "with `headrace targets build`"
        )
    return {name: _level(path, name, facts) for name, facts in manifest["targets"].items()}


def _level(path: Path, name: str, facts: Any) -> Level:
    texts: dict[str, str] = {}
    for key in ("file", "sha256", "triple"):
        text = facts.get(key) if isinstance(facts, dict) else None
        if not isinstance(text, str):
            raise _no_manifest(path, f'"{key}" of {name} is no text')
        texts[key] = text
    if not _is_library(texts["file"]):
        raise _no_manifest(path, f'"file" of {name} is no name of a library of a pack')
    kernels = facts.get("kernels")
    if not isinstance(kernels, dict) or not all(isinstance(key, str) for key in kernels.values()):
        raise _no_manifest(path, f'"kernels" of {name} are no keys by name')
    return Level(**texts, kernels=kernels)


def _no_manifest(path: Path, why: str) -> KernelError:
    return KernelError(
        f"{path} is no manifest of a kernel pack: {why}; build the pack again with `headrace "
        "targets build`"
    )


def library_name(target: Target) -> str:
    """The file of a target's kernels."""
    return f"{_PREFIX}{target.name}{SYSTEMS[system_name(target)].suffix}"


def _is_library(file: str) -> bool:
    """Is it a name that `library_name` gives, and so no path?"""
    suffixes = tuple(system.suffix for system in SYSTEMS.values())
    return file.startswith(_PREFIX) and file.endswith(suffixes) and not set(file) & {*"/\\:"}


def old_libraries(folder: Path) -> set[str]:
    """Files of the pack that is there; none where there is none, or none that can be read."""
    with contextlib.suppress(KernelError):
        described = _read_manifest(folder / MANIFEST)["targets"].values()
        files = [facts.get("file") for facts in described if isinstance(facts, dict)]
        return {file for file in files if isinstance(file, str) and _is_library(file)}
    return set()
