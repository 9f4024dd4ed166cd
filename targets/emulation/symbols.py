"""Where a function lies in a static executable, and its code."""

from __future__ import annotations

import struct
from pathlib import Path

from headrace.errors import KernelError

_SYMTAB = 2
_LOAD = 1


def function_range(path: Path, name: str) -> tuple[int, int]:
    """First address of a function and the one behind it (little-endian ELF of 32 or 64 bits).

    Raises:
        KernelError: the executable has no such function.
    """
    data = path.read_bytes()
    wide = data[4] == 2
    rows = [section[1:] for section in sections(data)]
    # name, address and size of every symbol
    symbol, step = ("<I4xQQ", 24) if wide else ("<III4x", 16)
    for kind, at, n_bytes, names in rows:
        if kind != _SYMTAB:
            continue
        for entry in range(at, at + n_bytes, step):
            word, address, length = struct.unpack_from(symbol, data, entry)
            start = rows[names][1] + word
            if data[start : data.index(b"\0", start)].decode() == name:
                address &= ~1  # Thumb marks its code with bit 0
                return address, address + length
    raise KernelError(f"{path.name} has no function {name}")


def sections(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """Name (offset among names), type, offset, size and linked section of each section."""
    wide = data[4] == 2
    table, n_sections = (
        (struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0])
        if wide
        else (struct.unpack_from("<I", data, 32)[0], struct.unpack_from("<H", data, 48)[0])
    )
    header, size = ("<II16xQQI", 64) if wide else ("<II8xIII", 40)
    return [struct.unpack_from(header, data, table + i * size) for i in range(n_sections)]


def section_bytes(data: bytes, name: str) -> int:
    """Of all sections of an object file whose name is this, or begins with it and a dot."""
    rows = sections(data)
    (at,) = struct.unpack_from("<H", data, 62 if data[4] == 2 else 50)
    names = rows[at][2]
    total = 0
    for word, _, _, size, _ in rows:
        start = names + word
        own = data[start : data.index(b"\0", start)].decode()
        if own == name or own.startswith(f"{name}."):
            total += size
    return total


def segments(path: Path) -> tuple[int, list[tuple[int, int, bytes]]]:
    """Where a little-endian ELF of 32 or 64 bits begins, and its segments.

    Of each segment the address, the bytes in memory and its content, which may be shorter.
    """
    data = path.read_bytes()
    wide = data[4] == 2
    word = "<Q" if wide else "<I"
    entry = struct.unpack_from(word, data, 24)[0]
    table = struct.unpack_from(word, data, 32 if wide else 28)[0]
    n_segments = struct.unpack_from("<H", data, 56 if wide else 44)[0]
    # type, offset, address, bytes in the file and in memory of every segment
    header, size = ("<I4xQQ8xQQ", 56) if wide else ("<III4xII", 32)
    rows = [struct.unpack_from(header, data, table + i * size) for i in range(n_segments)]
    return entry, [
        (address, room, data[at : at + n_bytes])
        for kind, at, address, n_bytes, room in rows
        if kind == _LOAD
    ]


def code_between(path: Path, low: int, high: int) -> bytes:
    """The bytes at addresses low <= a < high.

    Raises:
        KernelError: no one segment holds them.
    """
    for address, _, content in segments(path)[1]:
        if address <= low and high <= address + len(content):
            return content[low - address : high - address]
    raise KernelError(f"{path.name} has nothing at {low:#x}")
