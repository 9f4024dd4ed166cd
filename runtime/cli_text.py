"""What commands read as text: stdin, and files that must be text."""

from __future__ import annotations

import sys
from typing import TextIO

from headrace.errors import HeadraceError


def stdin() -> TextIO:
    """The process's stdin.

    Raises:
        HeadraceError: it is closed.
    """
    if sys.stdin is None:
        raise HeadraceError("stdin is closed, and the command is to read from it")
    return sys.stdin


def text_of(path: str) -> str:
    """A text file in UTF-8, or what comes through a pipe (`-`).

    Raises:
        HeadraceError: it cannot be read, or is no text: figures that were measured on it would be
            of no use, and nobody would see that.
    """
    try:
        if path == "-":
            data = stdin().buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
    except OSError as error:
        raise HeadraceError(f"cannot read the text {path}: {error.strerror}") from error
    try:
        found = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_text(path, data, error.start) from error
    if "\0" in found:
        raise _no_text(path, data, data.index(0))
    return found


def _no_text(path: str, data: bytes, offset: int) -> HeadraceError:
    what = "a zero byte" if data[offset] == 0 else f"the byte 0x{data[offset]:02x}, no UTF-8"
    return HeadraceError(
        f"{'stdin' if path == '-' else path} is no text: it has {what}, at offset {offset:,}; "
        "name a text file, and if this is one in another encoding, convert it first "
        "(`iconv -f latin1 -t utf-8`)"
    )
