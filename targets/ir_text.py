"""Pieces of LLVM IR as text; nothing here needs LLVM."""

from __future__ import annotations


def constant_bytes(data: bytes) -> str:
    """A constant array of bytes in IR text."""
    return f'[{len(data)} x i8] c"' + "".join(f"\\{byte:02X}" for byte in data) + '"'
