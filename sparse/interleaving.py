"""Pieces of the formats' kernels: tiling (the native twin of `format.interleave`), weights, and
when memory is asked for them."""

from __future__ import annotations

from typing import Any

from headrace.targets.simd import (
    and_u8,
    bits_i32,
    copy_runs,
    eights,
    get_u8,
    get_u16,
    load_runs,
    load_u8,
    part,
    prefetch,
    put_u8,
    put_u16,
    shl,
    shl_u8,
    shr,
    shr_u8,
    splat_i32,
    store_i32,
    store_u8,
    store_u8_quarters,
)


def interleave_words(src: Any, row_bytes: Any, dst: Any, n_words: Any) -> None:
    """Runs of 4 bytes of 16 rows side by side, `n_words` times (a multiple of 4)."""
    for k in range(n_words // 4):
        copy_runs(dst + k * 256, src + k * 16, row_bytes, 4)


def interleave_halves(src: Any, row_bytes: Any, dst: Any) -> None:
    """One float16 of each of 16 rows side by side."""
    for row in range(16):
        put_u16(dst + row * 2, get_u16(src + row * row_bytes))


def interleave_bytes(src: Any, row_bytes: Any, dst: Any) -> None:
    """One byte of each of 16 rows side by side."""
    for row in range(16):
        put_u8(dst + row, get_u8(src + row * row_bytes))


def load_eights(w: Any, tiles: Any, stride: Any) -> Any:
    """The 128 bytes at `w` of each tile, as `dot8` takes them."""
    return eights(load_u8(w, tiles, stride), load_u8(w + 64, tiles, stride))


def ask_for(p: Any, n_bytes: Any) -> None:
    """Have memory bring the lines of some bytes that will be read."""
    for line in range(0, n_bytes, 64):
        prefetch(p + line)


def spread_scales(src: Any, row_bytes: Any, dst: Any) -> None:
    """The first 16 bytes of a Q4_K or Q5_K block (d, dmin, 6-bit scales and minimums) as 320.

    d of 16 rows, dmin of 16 rows, then of each of 8 sub-blocks 16 scales and 16 minimums, one byte
    each.
    """
    store_u8(dst, part(load_runs(src, row_bytes, 2), 0))  # d and dmin
    by_byte = load_runs(src, row_bytes, 1)
    first, second, third = part(by_byte, 1), part(by_byte, 2), part(by_byte, 3)
    store_u8_quarters(dst + 64, and_u8(first, 63), 32)
    store_u8_quarters(dst + 80, and_u8(second, 63), 32)
    store_u8_quarters(dst + 192, and_u8(third, 15) | and_u8(shr_u8(first, 2), 48), 32)
    store_u8_quarters(dst + 208, shr_u8(third, 4) | and_u8(shr_u8(second, 2), 48), 32)


def regroup_nibbles(src: Any, row_bytes: Any, low: Any, high: Any) -> None:
    """32 bytes of 16 rows: byte 16 + b goes behind byte b, into the same byte.

    The low nibbles of both make the 256 bytes at `low`, the high nibbles those at `high`; each
    lies in runs of 4 bytes.
    """
    lower = load_runs(src, row_bytes, 4)
    upper = load_runs(src + 16, row_bytes, 4)
    store_u8(low, and_u8(lower, 15) | shl_u8(upper, 4))
    store_u8(high, shr_u8(lower, 4) | and_u8(upper, 240))


def _pairs(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Bits 0..1 of a, 2..3 of b, 4..5 of c and 6..7 of d."""
    return and_u8(a, 3) | and_u8(b, 12) | and_u8(c, 48) | and_u8(d, 192)


def transpose_pairs(a: Any, b: Any, c: Any, d: Any, dst: Any, step: Any) -> None:
    """Bits 2k..2k+1 of vector j of the four become bits 2j..2j+1 of the one at dst + k * step."""
    store_u8(dst, _pairs(a, shl_u8(b, 2), shl_u8(c, 4), shl_u8(d, 6)))
    store_u8(dst + step, _pairs(shr_u8(a, 2), b, shl_u8(c, 2), shl_u8(d, 4)))
    store_u8(dst + 2 * step, _pairs(shr_u8(a, 4), shr_u8(b, 2), c, shl_u8(d, 2)))
    store_u8(dst + 3 * step, _pairs(shr_u8(a, 6), shr_u8(b, 4), shr_u8(c, 2), d))


def _swapped(x: Any, apart: Any, mask: Any) -> Any:
    """Exchange the bits of int32 lanes under `mask` with those `apart` higher."""
    change = (x ^ shr(x, apart)) & splat_i32(mask)
    return x ^ change ^ shl(change, apart)


def regroup_bits(bits: Any, dst: Any) -> None:
    """Of each 32 bits, bit 4g + i to 8i + g: as `format.transpose_bits` with 8 rows.

    That rotates the 5 bits of an index by 2, an exchange of two at a time.
    """
    high = bits_i32(bits)
    high = _swapped(high, 3, 0x0A0A0A0A)
    high = _swapped(high, 6, 0x00CC00CC)
    high = _swapped(high, 12, 0x0000F0F0)
    store_i32(dst, _swapped(high, 8, 0x0000FF00), 0)
