"""Calls of `headrace.targets.soft_float`: their names in object files, and what is linked to them.

LLVM calls these functions by names that a C library has, too, whose results may be other bits (a
`fmaf` that rounds twice, say), and which a program of your own may want to keep. So the calls get
names of ours as soon as there is code.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from headrace.targets.cache import KernelStore
from headrace.targets.emulation.symbols import sections
from headrace.targets.frames import wanted
from headrace.targets.soft_float import ROUTINES, kernel_named
from headrace.targets.table import symbol_of
from headrace.targets.target import Target

_SYMTAB, _SYMBOL_BYTES = 2, 16
_SECTIONS_AT, _SECTION_BYTES = 32, 40  # in an ELF file of 32 bits: where the table is, and a row
_OFFSET = 16  # of a row, where its offset is, and its size behind that
_OWN = {name: symbol_of(row.name) for name, row in ROUTINES.items()}


def renamed(code: bytes) -> bytes:
    """An object file (little-endian ELF of 32 bits) whose calls have names of ours."""
    rows, found = sections(code), bytearray(code)
    (table,) = struct.unpack_from("<I", code, _SECTIONS_AT)
    for _, kind, at, n_bytes, names in rows:
        if kind != _SYMTAB:
            continue
        begin, length = rows[names][2], rows[names][3]
        texts = bytearray(code[begin : begin + length])
        for entry in range(at, at + n_bytes, _SYMBOL_BYTES):
            (word,) = struct.unpack_from("<I", code, entry)
            own = _OWN.get(texts[word : texts.index(b"\0", word)].decode())
            if own is not None:
                struct.pack_into("<I", found, entry, len(texts))
                texts += own.encode() + b"\0"
        # Longer than they were: behind everything.
        struct.pack_into(
            "<II", found, table + names * _SECTION_BYTES + _OFFSET, len(found), len(texts)
        )
        found += texts
    return bytes(found)


def with_routines(objects: Sequence[bytes], target: Target) -> list[bytes]:
    """Object files of kernels, and those of the functions that they call.

    Raises:
        KernelError: a function does not compile for the chip.
    """
    if target.floats:
        return list(objects)
    rows = [kernel_named(name) for name in routines_in(objects)]
    return [*objects, *KernelStore(target).objects(rows).values()]


def routines_in(objects: Sequence[bytes]) -> list[str]:
    """Names of the functions that object files call; these call no others."""
    called = set[str]().union(*map(wanted, objects))
    return [row.name for row in ROUTINES.values() if symbol_of(row.name) in called]
