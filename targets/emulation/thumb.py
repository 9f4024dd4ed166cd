"""Kinds of Thumb instructions, as far as cores take different times for them.

Source: "Armv8-M Architecture Reference Manual" (DDI0553), part C2, and "Arm Cortex-M4 Technical
Reference Manual", section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator

OTHER, LOAD, BRANCH, DIVIDE, FUSED, VECTOR = (
    "other", "load", "branch", "divide", "fused", "vector",
)  # fmt: skip
_FLOATING = (9, 10, 11)  # coprocessors of scalar floating-point instructions


def kinds(code: bytes) -> Iterator[tuple[int, str]]:
    """Offset and kind of each instruction of a function."""
    at = 0
    while at + 2 <= len(code):
        first = int.from_bytes(code[at : at + 2], "little")
        if first < 0xE800:
            yield at, _short(first)
            at += 2
        else:
            yield at, _long(first, int.from_bytes(code[at + 2 : at + 4], "little"))
            at += 4


def _short(word: int) -> str:
    top = word >> 11
    if top in (0b01001, 0b01101, 0b01111, 0b10001, 0b10011) or 0x5600 <= word < 0x6000:
        return LOAD
    if 0xD000 <= word < 0xDE00 or top == 0b11100 or word & 0xF500 == 0xB100:
        return BRANCH
    return LOAD if top == 0b11001 else OTHER


def _long(first: int, second: int) -> str:
    if first & 0xEC00 == 0xEC00:
        scalar = (second >> 8 & 15) in _FLOATING
        if not scalar:
            return VECTOR
        if first & 0xFF30 == 0xED10:
            return LOAD
        return FUSED if first & 0xFFB0 in (0xEEA0, 0xEE90, 0xEE00) else OTHER
    if first & 0xFE10 == 0xF810 or first & 0xFE50 == 0xE850:
        return LOAD
    if first & 0xF800 == 0xF000 and second & 0x8000:
        return BRANCH
    return DIVIDE if first & 0xFFD0 == 0xFB90 else OTHER
