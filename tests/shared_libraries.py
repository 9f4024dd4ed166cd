"""What shared libraries show and what they need, read from their files: ELF, Mach-O and PE."""

from __future__ import annotations

import struct


def symbols(data: bytes) -> tuple[set[str], set[str]]:
    """(exported, needed) symbols of a little-endian library; Mach-O's without their underscore."""
    if data[:4] == b"\x7fELF":
        return _elf(data)
    if data[:4] == b"\xcf\xfa\xed\xfe":
        return _macho(data)
    assert data[:2] == b"MZ"
    return _pe(data)


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _elf(data: bytes) -> tuple[set[str], set[str]]:
    wide = data[4] == 2
    table = struct.unpack_from("<Q", data, 40)[0] if wide else struct.unpack_from("<I", data, 32)[0]
    n = struct.unpack_from("<H", data, 60 if wide else 48)[0]
    header, size = ("<4xI16xQQI", 64) if wide else ("<4xI8xIII", 40)
    sections = [struct.unpack_from(header, data, table + i * size) for i in range(n)]
    shown, needed = set(), set()
    for kind, at, n_bytes, names in sections:
        if kind == 6:  # dynamic: libraries it needs
            entry = struct.Struct("<QQ" if wide else "<II")
            assert 1 not in {tag for tag, _ in entry.iter_unpack(data[at : at + n_bytes])}
        if kind != 11:  # dynamic symbols
            continue
        symbol, step = ("<IBxH16x", 24) if wide else ("<I8xBxH", 16)
        for i in range(at + step, at + n_bytes, step):
            name, info, section = struct.unpack_from(symbol, data, i)
            if info >> 4:  # not local
                (shown if section else needed).add(_text(data, sections[names][1] + name))
    return shown, needed


def _macho(data: bytes) -> tuple[set[str], set[str]]:
    n_commands = struct.unpack_from("<I", data, 16)[0]
    shown, needed, at = set(), set(), 32
    for _ in range(n_commands):
        command, size = struct.unpack_from("<II", data, at)
        assert command != 0xC  # a library that it needs
        if command == 2:  # symbols
            first, n, names = struct.unpack_from("<III", data, at + 8)
            for i in range(first, first + 16 * n, 16):
                name, kind = struct.unpack_from("<IB", data, i)
                if kind & 1 and not kind & 0x10:  # external, and not private
                    (shown if kind & 0xE else needed).add(_text(data, names + name)[1:])
        at += size
    return shown, needed


def _pe(data: bytes) -> tuple[set[str], set[str]]:
    start = struct.unpack_from("<I", data, 60)[0]
    assert data[start : start + 4] == b"PE\0\0"
    n_sections, optional = struct.unpack_from("<2xH12xH", data, start + 4)
    assert struct.unpack_from("<H", data, start + 24)[0] == 0x20B  # 64 bits
    exports, _, _, imported = struct.unpack_from("<IIII", data, start + 24 + 112)
    sections = [
        struct.unpack_from("<8xIIII", data, start + 24 + optional + 40 * i)
        for i in range(n_sections)
    ]

    def place(address: int) -> int:
        for _, low, n_bytes, at in sections:
            if low <= address < low + n_bytes:
                return int(address - low + at)
        raise AssertionError(f"nothing at {address:#x}")

    table = place(exports)
    n, _, names = struct.unpack_from("<III", data, table + 24)
    words = struct.unpack_from(f"<{n}I", data, place(names))
    return {_text(data, place(word)) for word in words}, {"imports"} if imported else set()
