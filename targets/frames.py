"""Bytes of stack that functions of an object file take, read from their machine code.

Code of microcontrollers moves the stack pointer by numbers that stand in it, when a function begins
(or, where it needs none on some way, later): all that a function takes away, added up, is what it
takes at most, without what it calls. Encodings: "Armv8-M Architecture Reference Manual" (DDI0553),
part C2; "The RISC-V Instruction Set Manual", volume I.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial

from headrace.errors import KernelError
from headrace.targets.emulation.symbols import sections
from headrace.targets.target import Target

_SYMTAB, _FUNCTION = 2, 2


def frames(code: bytes, target: Target) -> dict[str, int]:
    """Bytes of stack of each function of an object file (little-endian ELF of 32 bits).

    Raises:
        KernelError: a function moves its stack pointer by a number that its code does not name.
    """
    riscv = target.architecture.startswith("riscv")
    moved = partial(_riscv, vector_bytes=target.vector_bytes) if riscv else _thumb
    found = {}
    for name, section, at, n_bytes in _functions(code):
        taken = 0
        for _, by in moved(section[at : at + n_bytes]):
            if by is None:
                raise KernelError(f"{name} of {target.name} takes an unknown number of stack bytes")
            taken += by
        found[name] = taken
    return found


def wanted(code: bytes) -> set[str]:
    """Names that an object file takes from others."""
    return {name for name, _, _, _, index in _symbols(code) if name and index == 0}


def _functions(code: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    """Name, section, offset in that and bytes of each function."""
    rows = sections(code)
    for name, value, size, info, index in _symbols(code):
        if info & 15 == _FUNCTION and 0 < index < len(rows):
            _, _, begin, length, _ = rows[index]
            yield name, code[begin : begin + length], value & ~1, size


def _symbols(code: bytes) -> Iterator[tuple[str, int, int, int, int]]:
    """Name, value, size, kind and section of each symbol."""
    rows = sections(code)
    for _, kind, at, n_bytes, names in rows:
        for entry in range(at, at + n_bytes, 16) if kind == _SYMTAB else ():
            word, value, size, info, _, index = struct.unpack_from("<IIIBBH", code, entry)
            start = rows[names][2] + word
            yield code[start : code.index(b"\0", start)].decode(), value, size, info, index


def _thumb(code: bytes) -> Iterator[tuple[int, int | None]]:
    """Offset of each instruction that lets the stack grow, and by how much."""
    at = 0
    while at + 2 <= len(code):
        word = int.from_bytes(code[at : at + 2], "little")
        if word < 0xE800:
            if word & 0xFE00 == 0xB400:  # push
                yield at, 4 * (word & 0x1FF).bit_count()
            elif word & 0xFF80 == 0xB080:  # sub sp, #
                yield at, 4 * (word & 0x7F)
            at += 2
            continue
        second = int.from_bytes(code[at + 2 : at + 4], "little")
        if word == 0xE92D:  # push.w
            yield at, 4 * second.bit_count()
        elif word == 0xF84D and second & 0xFFF == 0xD04:  # str x, [sp, #-4]!
            yield at, 4
        elif word == 0xE96D or (
            word & 0xFFBF == 0xED2D and second & 0xE00 == 0xA00
        ):  # strd x, y, [sp, #-n]!
            yield at, 4 * (second & 0xFF)
        elif word & 0xFBFF in (0xF1AD, 0xF2AD) and second & 0x8F00 == 0xD00:  # sub.w sp, sp, #
            number = (word >> 10 & 1) << 11 | (second >> 12) << 8 | second & 0xFF
            yield at, number if word & 0x200 else _modified(number)
        elif word == 0xEBAD and second & 0xF00 == 0xD00:  # sub.w sp, sp, x
            yield at, None
        elif word == 0xF36F and second & 0x70C0 == 0:  # bfc x, #0, #n
            then = int.from_bytes(code[at + 4 : at + 6], "little")
            if then & 0xFF87 == 0x4685:  # mov sp, x: it is aligned
                yield at, 2 << (second & 0x1F)
        at += 4


def _modified(number: int) -> int:
    """The constant that 12 bits stand for ("modified immediate")."""
    low = number & 0xFF
    if number >> 10 == 0:
        return (low, low << 16 | low, low << 24 | low << 8, low * 0x01010101)[number >> 8]
    byte, turned = 0x80 | number & 0x7F, number >> 7
    return byte << 32 - turned


def _riscv(code: bytes, vector_bytes: int) -> Iterator[tuple[int, int | None]]:
    """The same of RISC-V; a multiple of a vector's bytes is taken from a register."""
    at, known = 0, dict[int, int]()  # numbers in registers
    while at + 2 <= len(code):
        word = int.from_bytes(code[at : at + 4], "little")
        if word & 3 != 3:
            word &= 0xFFFF
            to = word >> 7 & 31
            if word & 0xEF83 == 0x6101 and word >> 12 & 1:  # c.addi16sp
                number = word >> 6 & 1, word >> 2 & 1, word >> 5 & 1, word >> 3 & 3, 1
                shifts = (4, 5, 6, 7, 9)
                yield at, 1024 - sum(n << by for n, by in zip(number, shifts, strict=True))
            elif word & 0xFF83 == 0x1101:  # c.addi sp, -n
                yield at, 32 - (word >> 2 & 0x1F)
            elif word & 0xF003 == 0x0002 and to in known:  # c.slli
                known[to] <<= word >> 2 & 0x1F
            at += 2
            continue
        to, of = word >> 7 & 31, word >> 15 & 31
        if (
            word & 0xFFFFF == 0x10113 and word >> 31
        ) or word & 0xFFFFF == 0x17113:  # addi sp, sp, -n
            yield at, 4096 - (word >> 20)
        elif word & 0xFFFFF07F == 0xC2202073:  # csrr x, vlenb
            known[to] = vector_bytes
        elif word & 0xFE00707F == 0x1013 and of in known:  # slli
            known[to] = known[of] << (word >> 20 & 31)
        elif word & 0xFE0FFFFF == 0x40010133:  # sub sp, sp, x
            yield at, known.get(word >> 20 & 31)
        at += 4
