"""Files that are written whole or not at all: under another name, then renamed.

The standard library is all this needs: every part of Headrace may use it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(
    target: Path, *, check: Callable[[], object] | None = None, durable: bool = True
) -> Iterator[BinaryIO]:
    """A file that gets its name when all is written; when that fails, nothing is left of it.

    What is written may be read back from its descriptor.

    Args:
        target: in a directory that exists. A file of that name is replaced.
        check: called before the file gets its name; what it raises prevents that.
        durable: see `publish`.

    Raises:
        OSError: it cannot be written.
    """
    part = target.with_name(f".{target.name[:99]}-{os.urandom(4).hex()}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(part, flags, 0o666), "wb") as file:
            yield file
        if check is not None:
            check()
        publish(part, target, durable=durable)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def write_whole(target: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to a file by `whole_file`; directories above it are made.

    Raises:
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target, durable=durable) as file:
        file.write(data)


def check_replaceable(target: Path) -> None:
    """A file may be replaced; anything else, such as a device, would be gone.

    Raises:
        FileExistsError: there is something that is no file.
    """
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "there is something that is no file", str(target))


def publish(part: Path, target: Path, *, durable: bool = True) -> None:
    """Give a finished file its name, in place of any that has it.

    Args:
        part: the file, on the file system of `target`.
        durable: wait until the contents and then the name are on the disk: after a power failure
            the name stands for the whole file, or for what it stood for before.

    Raises:
        OSError: it cannot be written or renamed; then `part` still has its old name.
    """
    check_replaceable(target)
    if durable:
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    os.replace(part, target)
    if durable and os.name == "posix":
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
