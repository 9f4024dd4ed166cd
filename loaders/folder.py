"""The files of a model directory: JSON within bounds, and nothing outside of the directory."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.errors import ModelFileError, ModelNotFoundError
from headrace.loaders.layout import AGAIN
from headrace.loaders.reader import open_regular

_PLAIN_NAME = re.compile(r"[^./\\:\0][^/\\:\0]{0,254}")


class Folder:
    """A directory whose files are a model.

    Links may lead to files of the same directory, and out of a snapshot of the Hugging Face cache
    to the blobs of the same repository. Names and links that lead elsewhere are refused: they come
    with the model, and the model is a stranger's.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        real = Path(os.path.realpath(path))
        self._roots = [real]
        if real.parent.name == "snapshots":
            self._roots.append(real.parent.parent / "blobs")

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).exists()

    def file(self, name: str, named_by: Path | None = None) -> Path:
        """The path of a file that must be in the directory.

        Args:
            name: the file's name.
            named_by: the file that has the name, if it comes from one.

        Raises:
            ModelNotFoundError: there is no such file.
            ModelFileError: the name or a link leads out of the directory.
        """
        if not _PLAIN_NAME.fullmatch(name):
            raise ModelFileError(
                f"{name[:80]!r} is no name of a file in this directory; {AGAIN}", path=named_by
            )
        path = self.path / name
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self._roots):
            raise ModelFileError(
                f"a link that leads out of its directory, to {real}; put the file itself there, or "
                "name the directory that it lies in",
                path=path,
            )
        if not path.exists():
            which = "" if named_by is None else f", which {named_by.name} names"
            raise ModelNotFoundError(f"{path}: no such file{which}; download the whole model again")
        return path

    def read(self, name: str, max_bytes: int) -> bytes:
        """All bytes of a small file.

        Raises:
            ModelNotFoundError: there is no such file.
            ModelFileError: it is longer than `max_bytes`, or cannot be read.
        """
        path = self.file(name)
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ModelFileError(
                    f"{size:,} bytes, more than the {max_bytes:,} that such a file may have",
                    path=path,
                )
            return read_exactly(file, size, path)

    def json(self, name: str, max_bytes: int) -> dict[str, Any]:
        """The object in a JSON file; see `parse_object`."""
        raw = self.read(name, max_bytes)
        return parse_object(raw, self.path / name)


def read_exactly(file: Any, n_bytes: int, path: Path) -> bytes:
    """The next bytes of a file.

    Raises:
        ModelFileError: there are fewer, or they cannot be read.
    """
    chunks, have = [], 0
    while have < n_bytes:
        try:
            chunk = file.read(n_bytes - have)
        except OSError as error:
            raise ModelFileError(f"read failed: {error.strerror}", path=path) from error
        if not chunk:
            raise ModelFileError("the file shrank while it was read", path=path)
        chunks.append(chunk)
        have += len(chunk)
    return b"".join(chunks)


# What a nested object or array takes in Python is many times the two bytes that it takes in a
# file: so many there may be (the largest vocabularies have half a million merge rules).
MAX_ARRAYS = 2_000_000
MAX_OBJECTS = 400_000


def parse_object(raw: bytes, path: Path, what: str = "the file") -> dict[str, Any]:
    """A JSON object from bytes of a stranger: strict UTF-8, no name twice, no NaN.

    Raises:
        ModelFileError: it is none, or larger than any model's.
    """
    if raw.count(b"[") > MAX_ARRAYS or raw.count(b"{") > MAX_OBJECTS:
        raise ModelFileError(f"{what} has more parts than any known model's; {AGAIN}", path=path)
    try:
        with no_collection():
            value = json.loads(
                raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
            )
    except RecursionError:
        raise ModelFileError(f"{what} is nested too deep; {AGAIN}", path=path) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        problem = f"{what} is no valid JSON: {str(error)[:200]}; {AGAIN}"
        raise ModelFileError(problem, path=path) from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{what} is no JSON object; {AGAIN}", path=path)
    return value


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Look for no garbage: among half a million new lists that takes as long as the rest."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:80]!r} occurs twice")
            seen.add(name)
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
