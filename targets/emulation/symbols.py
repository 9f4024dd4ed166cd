"""Where a function lies in a static executable."""

from __future__ import annotations

import struct
from pathlib import Path

from headrace.errors import KernelError

_SYMTAB = 2


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
