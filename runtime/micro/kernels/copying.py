"""Copying and filling bytes, for kernels to inline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.targets.simd import bits_u8, load_i8_i32, load_u8, store_i8, store_u8

BEHIND = 16  # bytes behind an array that may be read, and behind a buffer that may be written


def copy_of(lanes: int) -> Callable[[Any, Any, Any], None]:
    """Copies so many bytes and up to a piece more: into buffers, in order."""
    piece = min(4 * lanes, BEHIND)

    def copy(to: Any, source: Any, count: Any) -> None:
        while count > 0:
            if lanes == BEHIND:
                store_i8(to, load_i8_i32(source, 1, 0), 0)
            else:
                store_u8(to, load_u8(source, 1, 0))
            to, source, count = to + piece, source + piece, count - piece

    return copy


def fill_of(lanes: int) -> Callable[[Any, Any, Any], None]:
    """The same with one byte, of which each lane of a vector has four."""
    piece = min(4 * lanes, BEHIND)

    def fill(to: Any, bytes_of_lanes: Any, count: Any) -> None:
        while count > 0:
            if lanes == BEHIND:
                store_i8(to, bytes_of_lanes, 0)
            else:
                store_u8(to, bits_u8(bytes_of_lanes))
            to, count = to + piece, count - piece

    return fill


def four_times(code: int) -> int:
    """A signed byte in each byte of an int32."""
    word = (code & 0xFF) * 0x01010101
    return word - 2**32 if word >= 2**31 else word
