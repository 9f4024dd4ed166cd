"""Model files that are read while the model runs, and whether they are still the same."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path

from headrace.errors import ModelFileError
from headrace.loaders.reader import TensorReader, open_regular

PAGE = 4096
_F_NOCACHE = 48  # macOS


Stamp = tuple[int, int]  # size, and when it was last written to


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file as it is now.

    Raises:
        OSError: there is none.
    """
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


class StreamedFile:
    """A file open for reads through the system's cache, and past it where that can be had.

    Args:
        path: the file.
        stamp: what it had when the model was loaded.

    Raises:
        ModelNotFoundError, ModelFileError: it cannot be opened, or has changed.
    """

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path = path
        self.plain = open_regular(path)
        self._stamp = stamp
        self._direct: FileIO | None = None
        with contextlib.suppress(OSError):
            self._direct = _open_direct(path)
        try:
            self.check()
            if self._direct is not None and not os.path.sameopenfile(
                self._direct.fileno(), self.plain.fileno()
            ):
                raise ModelFileError("the file was replaced while it was opened", path=path)
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> int | None:
        """Descriptor for aligned reads past the system's cache; None: there is none."""
        return None if self._direct is None else self._direct.fileno()

    def check(self) -> None:
        """Refuse a file that is no longer what it was: only its stamp tells, for all of its bytes.

        Raises:
            ModelFileError: it was truncated or written to.
        """
        found = os.fstat(self.plain.fileno())
        if (found.st_size, found.st_mtime_ns) == self._stamp:
            return
        size = self._stamp[0]
        how = "written to" if found.st_size == size else f"cut or grew from {size:,} bytes"
        raise ModelFileError(
            f"the file changed while it is in use (it was {how}; now it has {found.st_size:,} "
            "bytes): load the model again, or put the file back with its time stamp",
            path=self.path,
        )

    def forget_cached(self, offset: int, n_bytes: int) -> None:
        """Drop a range from the system's cache, where the system lets us."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.plain.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it."""
        self.plain.close()
        if self._direct is not None:
            self._direct.close()


def _open_direct(path: Path) -> FileIO | None:
    if hasattr(os, "O_DIRECT"):
        flags = os.O_RDONLY | os.O_DIRECT
        return FileIO(path, "r", opener=lambda p, _: os.open(p, flags))
    if sys.platform == "darwin":
        import fcntl

        file = open_regular(path)
        fcntl.fcntl(file.fileno(), _F_NOCACHE, 1)
        return file
    return None


def open_streamed(stamps: Mapping[Path, Stamp]) -> dict[Path, StreamedFile]:
    """Open files that have been loaded with these stamps.

    Raises:
        ModelNotFoundError, ModelFileError: one cannot be opened, or has changed.
    """
    files: dict[Path, StreamedFile] = {}
    try:
        for path, stamp in stamps.items():
            files[path] = StreamedFile(path, stamp)
    except BaseException:
        close_all(files.values())
        raise
    return files


def reader_of(files: Mapping[Path, StreamedFile]) -> TensorReader:
    """Reads tensors from files as they are open, whatever their names lead to by now."""
    return TensorReader({path: file.plain for path, file in files.items()})


def close_all(files: Iterable[StreamedFile]) -> None:
    """Close files."""
    for file in files:
        file.close()
