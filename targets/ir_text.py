"""Pieces of LLVM IR as text; nothing here needs LLVM."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """Something in a program that is not linked yet."""

    symbol: str
    offset: int = 0


def constant_bytes(data: bytes) -> str:
    """A constant array of bytes in IR text."""
    return f'[{len(data)} x i8] c"' + "".join(f"\\{byte:02X}" for byte in data) + '"'


def argument_words(
    name: str, values: Iterable[int | float | Place], word_bytes: int, kind: str = "global"
) -> str:
    """A global of 8-byte slots; addresses are for the linker to fill in.

    Args:
        kind: "global", or "constant" of what is never written.
    """
    fields = []
    for value in values:
        if isinstance(value, float):
            (bits,) = struct.unpack("<i", struct.pack("<f", value))
            fields.append(f"i64 {bits & 0xFFFFFFFF}")
        elif isinstance(value, int):
            fields.append(f"i64 {value}")
        else:
            fields.append(f"ptr getelementptr (i8, ptr @{value.symbol}, i64 {value.offset})")
            if word_bytes == 4:
                fields.append("i32 0")
    types = ", ".join(field.split(" ", 1)[0] for field in fields)
    return f"@{name} = internal {kind} <{{ {types} }}> <{{ {', '.join(fields)} }}>, align 64\n"
