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
    table, n_sections = (
        (struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0])
        if wide
        else (struct.unpack_from("<I", data, 32)[0], struct.unpack_from("<H", data, 48)[0])
    )
    # type, offset, size and linked section of every section header
    header, size = ("<4xI16xQQI", 64) if wide else ("<4xI8xIII", 40)
    sections = [struct.unpack_from(header, data, table + i * size) for i in range(n_sections)]
    # name, address and size of every symbol
    symbol, step = ("<I4xQQ", 24) if wide else ("<III4x", 16)
    for kind, at, n_bytes, names in sections:
        if kind != _SYMTAB:
            continue
        for entry in range(at, at + n_bytes, step):
            word, address, length = struct.unpack_from(symbol, data, entry)
            start = sections[names][1] + word
            if data[start : data.index(b"\0", start)].decode() == name:
                return address & ~1, address + length  # Thumb marks its code with bit 0
    raise KernelError(f"{path.name} has no function {name}")


def code_between(path: Path, low: int, high: int) -> bytes:
    """The bytes at addresses low <= a < high (little-endian ELF of 32 or 64 bits).

    Raises:
        KernelError: no one segment holds them.
    """
    data = path.read_bytes()
    wide = data[4] == 2
    table = struct.unpack_from("<Q", data, 32)[0] if wide else struct.unpack_from("<I", data, 28)[0]
    n_segments = struct.unpack_from("<H", data, 56 if wide else 44)[0]
    # type, offset, address and bytes of every segment
    header, size = ("<I4xQQ8xQ", 56) if wide else ("<III4xI", 32)
    for i in range(n_segments):
        kind, at, address, n_bytes = struct.unpack_from(header, data, table + i * size)
        if kind == _LOAD and address <= low and high <= address + n_bytes:
            return data[at + low - address : at + high - address]
    raise KernelError(f"{path.name} has nothing at {low:#x}")
