"""Bytes of tensors, read into the caller's memory.

Nothing is mapped: a mapped file that shrinks kills the process with SIGBUS.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import ModelFileError, ModelNotFoundError

if TYPE_CHECKING:
    from headrace.loaders.model_file import TensorInfo

# Where reading moves the file's own position, which is one for all readers that share the file.
_ONE_AT_A_TIME = threading.Lock()


def open_regular(path: Path, what: str = "model") -> FileIO:
    """Open a regular file for reading; anything else is refused before it can block.

    Args:
        what: the file should have, for errors.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFileError: a directory, a device, or not allowed to be read.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ModelFileError(_not_a_file(path, mode, what), path=path)
        # A FIFO put there since the stat would block without O_NONBLOCK.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = FileIO(path, "r", opener=lambda p, _: os.open(p, flags))
    except FileNotFoundError:
        link = " (a link to a file that is gone)" if path.is_symlink() else ""
        raise ModelNotFoundError(f"{path}: no such file{link}; check the path") from None
    except PermissionError:
        raise ModelFileError("permission denied: make the file readable", path=path) from None
    except ValueError as error:  # a NUL in the name
        raise ModelNotFoundError(f"{str(path)!r} is not a file name: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise ModelNotFoundError(f"{path}: {error.strerror}; check the path") from None
        raise ModelFileError(f"cannot be opened: {error.strerror}", path=path) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ModelFileError("changed while it was opened, not a regular file", path=path)
    return file


def _not_a_file(path: Path, mode: int, what: str) -> str:
    if stat.S_ISDIR(mode) and what != "model":
        return f"a directory, not a file with {what}: move it away"
    if stat.S_ISDIR(mode):
        names = sorted(p.name for p in path.glob("*.gguf"))[:3]
        hint = f"give a file in it, such as {names[0]}" if names else "there is no .gguf file in it"
        return f"a directory, not a model file: {hint}"
    kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
    return f"{kind}, not a regular file: copy the {what} to a file first"


def check_range(info: TensorInfo, start: int, n_bytes: int) -> None:
    """Refuse bytes outside a tensor: the caller's mistake, not the file's, hence a ValueError."""
    if start < 0 or n_bytes < 0 or start + n_bytes > info.n_bytes:
        raise ValueError(
            f"bytes {start} to {start + n_bytes} are outside tensor {info.name!r} "
            f"of {info.n_bytes} bytes"
        )


class TensorReader:
    """Reads tensors into the caller's memory; keeps the files open between reads.

    `readinto` may be called from several threads at once. `close` may not be called while a read
    is going on.
    """

    def __init__(self, opened: Mapping[Path, FileIO] | None = None) -> None:
        """Read through files that are `opened` already, which stay open; open others."""
        self._opened = opened or {}
        self._files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()
        self._closed = False

    def readinto(self, info: TensorInfo, start: int, buffer: Any) -> None:
        """Fill `buffer` (writable, contiguous) from byte `start` of the tensor.

        Raises:
            ModelFileError: the file shrank since its header was read, or the device failed.
            ValueError: the range is not inside the tensor.
        """
        view = memoryview(buffer)
        check_range(info, start, view.nbytes)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        file = self._file(info.path)
        done = 0
        while done < len(view):
            offset = info.offset + start + done
            try:
                n = self._read_once(file, view[done:], offset)
            except OSError as error:
                raise ModelFileError(
                    f"read failed: {error.strerror}. Check the disk, and try again when the file "
                    "can be read",
                    path=info.path,
                    tensor=info.name,
                    offset=offset,
                ) from error
            if n == 0:
                raise ModelFileError(
                    f"the file shrank: it ends {len(view) - done:,} bytes early. Do not write to a "
                    "model that is in use; put it back, or fetch it again",
                    path=info.path,
                    tensor=info.name,
                    offset=offset,
                )
            done += n

    def _read_once(self, file: FileIO, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with _ONE_AT_A_TIME:
            file.seek(offset)
            return file.readinto(view) or 0

    def _file(self, path: Path) -> FileIO:
        with self._lock:
            if self._closed:
                raise ValueError("this TensorReader is closed")
            file = self._opened.get(path) or self._files.get(path)
            if file is None:
                file = self._files[path] = open_regular(path)
            return file

    def close(self) -> None:
        """Close what it has opened; the reader cannot be used again."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
