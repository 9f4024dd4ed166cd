"""A file that is written tensor by tensor under another name, and gone on with when interrupted.

Beside `NAME` lie `.NAME-<hash>.part`, the bytes so far, and `.NAME-<hash>.part.json`, which says
what they are: a key of all that decides the bytes, and how many tensors are complete on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.atomic_file import publish, write_whole
from headrace.errors import HeadraceError
from headrace.sizes import format_size

_EVERY_S = 1.0  # how often what is complete is made sure of
_JOURNAL_BYTES = 8 << 20  # the most that is read of what lies beside a part


class PartialFile:
    """The file to be; use as a context.

    When an exception ends the context, what is complete stays for another time; not so with
    OSError, as a full disk is the likeliest: then nothing is left, as when nothing was complete.

    Attributes:
        done: tensors that were complete when it was opened.
        other: whether there was a part of something else, which is lost.
        notes: what is known of the work on what is complete, kept with it; as JSON has it.
    """

    @staticmethod
    def name_of(target: Path) -> Path:
        """Where the part of a file lies."""
        tag = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
        return target.with_name(f".{target.name[:80]}-{tag}.part")

    def __init__(self, target: Path, key: str, size: int) -> None:
        """Open or make the part of `target`, of `size` bytes when complete.

        Raises:
            HeadraceError: another process is writing it.
            OSError: it cannot be written.
        """
        self._target = target
        self.path = self.name_of(target)
        self._journal = self.path.with_name(self.path.name + ".json")
        self._key, self._size = key, size
        self._lock = threading.Lock()
        self._published = False
        self._count, self._saved = 0, time.monotonic()
        self.done, self.other = 0, False
        self.notes: dict[str, Any] = {}
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        with contextlib.suppress(FileNotFoundError):
            try:
                fd = os.open(self.path, flags)
            except OSError as error:
                if error.errno != errno.ELOOP:  # a link: not ours
                    raise
            else:
                if self._resume(fd):
                    return fd
                os.close(fd)
                self.other = True
            os.unlink(self.path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._journal)
        fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        _take(fd, self._target)
        return fd

    def _resume(self, fd: int) -> bool:
        try:
            _take(fd, self._target)
        except HeadraceError:
            os.close(fd)
            raise
        found = _read_json(self._journal)
        done = found.get("done")
        if found.get("key") != self._key or type(done) is not int or done < 0:
            return False
        self.done = self._count = done
        notes = found.get("notes")
        self.notes = notes if isinstance(notes, dict) else {}
        return True

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        keep = kind is not None and not issubclass(kind, OSError) and self._count > 0
        try:
            if keep and not self._published:
                try:
                    self._save()
                except OSError:  # what was said before holds
                    keep = self._journal.exists()
        finally:
            os.close(self._fd)
            if not keep or self._published:
                for path in (self.path, self._journal):
                    with contextlib.suppress(OSError):
                        os.unlink(path)

    def tell(self, notice: Callable[[str], None], total: int, what: str) -> None:
        """Say what was found when it was opened: how much of `total`, or that it is lost."""
        if self.other:
            notice(f"{self.path} was of another source or other options: it is begun anew")
        elif self.done:
            notice(
                f"resuming what was interrupted: going on after {self.done:,} of {total:,} {what}, "
                f"which are in {self.path}"
            )

    def write(self, at: int, data: bytes | NDArray[np.uint8]) -> None:
        """Write bytes at an offset; from any thread.

        Raises:
            OSError: the disk cannot take them.
        """
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        while len(view):
            if hasattr(os, "pwrite"):
                n = os.pwrite(self._fd, view, at)
            else:
                with self._lock:
                    os.lseek(self._fd, at, os.SEEK_SET)
                    n = os.write(self._fd, view)
            at, view = at + n, view[n:]

    def read(self, at: int, n_bytes: int) -> bytes:
        """Read bytes that were written; from any thread.

        Raises:
            OSError: the disk does not give them.
        """
        parts = []
        while n_bytes:
            if hasattr(os, "pread"):
                part = os.pread(self._fd, n_bytes, at)
            else:
                with self._lock:
                    os.lseek(self._fd, at, os.SEEK_SET)
                    part = os.read(self._fd, n_bytes)
            if not part:
                raise OSError(errno.EIO, "the file ends too early")
            parts.append(part)
            at, n_bytes = at + len(part), n_bytes - len(part)
        return b"".join(parts)

    def finish(self, tensors: int) -> None:
        """Say how many tensors have been written completely.

        Raises:
            OSError: the disk cannot take them.
        """
        self._count = tensors
        if time.monotonic() - self._saved > _EVERY_S:
            self._save()

    def complete(self) -> None:
        """Say that all is written, but for what may change in the header.

        Raises:
            OSError: the disk cannot take it.
        """
        os.ftruncate(self._fd, self._size)
        self._save()

    def publish(self, check: Callable[[], object]) -> None:
        """Give the file its name, if `check` raises nothing.

        Raises:
            OSError: that cannot be done.
        """
        check()
        publish(self.path, self._target)
        self._published = True

    def _save(self) -> None:
        os.fsync(self._fd)
        text = json.dumps({"key": self._key, "done": self._count, "notes": self.notes})
        write_whole(self._journal, text.encode(), durable=False)
        self._saved = time.monotonic()


def parts_of(target: str | Path) -> list[Path]:
    """The parts that lie beside a file, its own and those of what it is made of."""
    path = Path(os.path.expanduser(target))
    return list(path.parent.glob(f".{glob.escape(path.name[:80])}*.part"))


def drop(path: Path, notice: Callable[[str], None]) -> None:
    """Remove the part of a file that is not wanted any more, and say so; there may be none.

    Raises:
        HeadraceError: another process is writing it.
        OSError: it cannot be removed.
    """
    part = PartialFile.name_of(path)
    if not part.is_file() or part.is_symlink():
        return
    fd = os.open(part, os.O_RDWR)
    try:
        _take(fd, path)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    part.unlink()
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    notice(f"{part} ({format_size(size)}) was of other options: it is removed")


def check_disk(target: Path, sizes: Mapping[Path, int], why: str = "") -> None:
    """Make sure that the disk has room for files that will be there at the same time.

    What is there of their parts is used again or goes.

    Args:
        target: the file that all this is for.
        sizes: bytes of each when complete.
        why: said behind how much it takes.

    Raises:
        HeadraceError: it has not.
        OSError: it cannot be asked.
    """
    free = shutil.disk_usage(target.parent).free
    missing = sum(sizes.values())
    for path in sizes:
        with contextlib.suppress(FileNotFoundError):
            missing -= PartialFile.name_of(path).lstat().st_size
    if free < missing:
        raise HeadraceError(
            f"the disk of {target.parent} has {format_size(free)} free, and {target.name} "
            f"takes {format_size(missing)}{why}; free some space"
        )


def _take(fd: int, target: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows lets nobody else open it
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise HeadraceError(
                f"another process is writing {target}; wait for it, or write to another file"
            ) from None
        # A file system without locks.


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()[:_JOURNAL_BYTES])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
