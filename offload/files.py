"""Model files that are read while the model runs, and whether they are still the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path

from headrace.errors import ModelFileError
from headrace.loaders.reader import open_regular

PAGE = 4096
_ONE_AT_A_TIME = threading.Lock()  # where reading moves the file's own position
SAMPLES = 64  # about so many pages of a file are compared
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
        samples: offsets of 4096 bytes each that are compared when its stamp has changed.
        stamp: what it had when the model was loaded.

    Raises:
        ModelNotFoundError, ModelFileError: it cannot be opened, or has changed.
    """

    def __init__(self, path: Path, samples: Iterable[int], stamp: Stamp) -> None:
        self.path = path
        self._samples = tuple(samples)
        self.plain = open_regular(path)
        self._direct: FileIO | None = None
        with contextlib.suppress(OSError):
            self._direct = _open_direct(path)
        self._stamp = stamp
        self._print = b""
        try:
            self.check()
            self._print = self._fingerprint()
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> int | None:
        """Descriptor for aligned reads past the system's cache; None: there is none."""
        return None if self._direct is None else self._direct.fileno()

    def check(self) -> None:
        """Refuse a file that is no longer what it was.

        Raises:
            ModelFileError: it was truncated or written to.
        """
        now = self._now()
        if now == self._stamp:
            return
        if now[0] != self._stamp[0]:
            raise self._changed(f"it had {self._stamp[0]:,} bytes and now has {now[0]:,}")
        if not self._print:
            raise self._changed("it was written to since the model was loaded")
        if self._fingerprint() != self._print:
            raise self._changed("its content is another")
        self._stamp = now  # touched, or put back as it was

    def _changed(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"the file changed while it is in use: {what}. Put it back, or load the model again",
            path=self.path,
        )

    def _now(self) -> Stamp:
        found = os.fstat(self.plain.fileno())
        return found.st_size, found.st_mtime_ns

    def _fingerprint(self) -> bytes:
        digest = hashlib.sha256()
        for offset in self._samples:
            digest.update(pread(self.plain, PAGE, offset))
        return digest.digest()

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


def pread(file: FileIO, n_bytes: int, offset: int) -> bytes:
    """Bytes at an offset; fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), n_bytes, offset)
    with _ONE_AT_A_TIME:
        file.seek(offset)
        return file.read(n_bytes)


def readinto(file: FileIO, view: memoryview, offset: int) -> int:
    """Fill `view` from an offset; gives how much there was, which is less at the file's end."""
    done = 0
    while done < len(view):
        if hasattr(os, "preadv"):
            n = os.preadv(file.fileno(), [view[done:]], offset + done)
        else:
            data = pread(file, len(view) - done, offset + done)
            n = len(data)
            view[done : done + n] = data
        if n == 0:
            break
        done += n
    return done


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


def open_streamed(
    reads: Sequence[tuple[Path, int]], stamps: Mapping[Path, Stamp]
) -> dict[Path, StreamedFile]:
    """Open the files of reads (path, offset), which have been loaded with these stamps.

    Raises:
        ModelNotFoundError, ModelFileError: one cannot be opened, or has changed.
    """
    offsets: dict[Path, list[int]] = {}
    for path, offset in reads:
        offsets.setdefault(path, [0]).append(offset)
    files: dict[Path, StreamedFile] = {}
    try:
        for path, samples in offsets.items():
            every = samples[:: max(1, len(samples) // SAMPLES)]
            files[path] = StreamedFile(path, every, stamps[path])
    except BaseException:
        close_all(files.values())
        raise
    return files


def close_all(files: Iterable[StreamedFile]) -> None:
    """Close files."""
    for file in files:
        file.close()
