"""Where tensors are that an ONNX file keeps in other files beside it.

A model names these files, and may come from anybody: nothing outside its own directory is read, and
nothing that a link of either kind leads to.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from headrace.errors import ModelFileError


def external_place(path: Path, tensor: Any, n_bytes: int) -> tuple[Path, int]:
    """File and offset of a TensorProto's external data, of which `n_bytes` are expected.

    Raises:
        ModelFileError: the place is not a plain file in the model's directory, or too short.
    """

    def bad(message: str) -> ModelFileError:
        return ModelFileError(message, path=path, tensor=tensor.name)

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    if (
        not parts
        or "\0" in location
        or PurePosixPath(location).is_absolute()
        or PureWindowsPath(location).drive
        or "\\" in location
        or ".." in parts
    ):
        raise bad(
            f"its data is said to be in {location[:80]!r}, which is not below the model's own "
            "directory: nothing else is read"
        )
    file = path.parent
    try:
        for part in parts:
            file = file / part
            found = os.lstat(file)
            if stat.S_ISLNK(found.st_mode):
                raise bad(f"its data is behind the link {file}: put the file itself there")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise bad(
            f"its data should be in {file}: {reason}; put that file beside the model"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise bad(f"its data is said to be in {file}, which is not a regular file")
    if found.st_nlink > 1:
        raise bad(
            f"its data is in {file}, which has {found.st_nlink} names (hard links): it may be "
            "somebody else's file; put a copy there"
        )
    offset, length = (_whole(entries, key, bad) for key in ("offset", "length"))
    if "length" in entries and length != n_bytes:
        raise bad(f"{length} bytes of {file} are said to be its data, and it has {n_bytes}")
    if offset + n_bytes > found.st_size:
        raise bad(
            f"its data should be at {offset} to {offset + n_bytes} of {file}, which has "
            f"{found.st_size} bytes: fetch it again"
        )
    return file, offset


def _whole(entries: dict[str, str], key: str, bad: Any) -> int:
    text = entries.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise bad(f"the {key} of its data is {text[:40]!r}, not a whole number")
    return int(text)
