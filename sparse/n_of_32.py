"""Single weights left out: of each 32 weights of a row the 16 or 8 largest are kept, in 4 bits.

For comparison with group sparsity (`headrace.sparse.gqs`): nearly what is called unstructured
sparsity, any weight may go, but that a number of each 32 stays, so that all blocks have the same
size. CPUs have no products that skip single weights, so a tile is made dense in the cache before it
is multiplied. With a scale for 32, `s16of32_g32` has 3.5 bits a weight and `s8of32_g32` 2.5; with
more than 23 of 32 nothing would be saved beside `i4_g32`. The layout is ours.

Row block (raw) of 32 weights, N of which are kept:
    field   bytes   what
    d       2       float16
    kept    4       uint32: bit i says that input i is kept
    qs      N/2     nibble k, the lowest first: the code of the k-th kept input; a weight is
                    d * code, -8..7 as two's complement

Any bytes are weights: inputs that `kept` has beyond N are zero, and where it has fewer the last
codes are of no account.

Tile block, and the plain form, which is multiplied: those of `headrace.sparse.dense_int8`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.dense_int8 import BLOCK, KEPT, QS, format_of
from headrace.sparse.format import Bytes, Format
from headrace.sparse.pattern import Mask
from headrace.targets.simd import (
    bits_u8,
    load_f16,
    load_i32,
    shl,
    shl_by,
    shr,
    shr_by,
    splat_i32,
    store_f32,
    store_u8,
)

COUNTS = (8, 16)  # in one word of 4 bytes, or two


def _ones(kept: Any) -> Any:
    """The lowest 4 bits as bytes 0 or 1."""
    four = kept & splat_i32(15)
    return (four * splat_i32(0x00204081)) & splat_i32(0x01010101)


def _so_far(ones: Any) -> Any:
    """Byte i: how many of the bytes up to i are 1."""
    return ones * splat_i32(0x01010101)


def _store(ones: Any, count: Any, codes: Any, out: Any) -> None:
    """4 inputs of 16 rows as bytes code + 8; their codes are the lowest nibbles of `codes`."""
    nibble, most = splat_i32(15), splat_i32(12)
    first = codes & nibble
    second = shr_by(codes, shl(count, 2) & splat_i32(4)) & nibble
    third = shr_by(codes, shr(count, 6) & most) & nibble
    fourth = shr_by(codes, shr(count, 14) & most)
    dense = (first | shl(second, 8)) | (shl(third, 16) | shl(fourth, 24))
    store_u8(out, bits_u8((dense & (shl(ones, 4) - ones)) ^ splat_i32(0x08080808)))


def _used(count: Any) -> Any:
    """Bits of codes that 4 inputs took."""
    return shr(count, 22) & splat_i32(28)


def _unpack_8(w: Any, table: Any, out: Any) -> None:
    """A tile block of 8 kept weights in the plain form."""
    store_f32(out, load_f16(w, 1, 0), 0)
    kept, codes = load_i32(w + 32, 1, 0), load_i32(w + 96, 1, 0)
    for q in range(8):
        ones = _ones(kept)
        count = _so_far(ones)
        _store(ones, count, codes, out + (64 + 64 * q))
        kept, codes = shr(kept, 4), shr_by(codes, _used(count))


def _unpack_16(w: Any, table: Any, out: Any) -> None:
    """A tile block of 16 kept weights in the plain form."""
    store_f32(out, load_f16(w, 1, 0), 0)
    kept, codes, more = load_i32(w + 32, 1, 0), load_i32(w + 96, 1, 0), load_i32(w + 160, 1, 0)
    for q in range(8):
        ones = _ones(kept)
        count = _so_far(ones)
        _store(ones, count, codes, out + (64 + 64 * q))
        used = _used(count)
        # A shift by 32 has no meaning, so it is done in two steps.
        codes = shr_by(codes, used) | shl_by(shl(more, 1), splat_i32(31) - used)
        kept, more = shr(kept, 4), shr_by(more, used)


_UNPACK = {8: _unpack_8, 16: _unpack_16}


def make(n: int) -> Format:
    """The format that keeps `n` of each 32 weights."""

    def put(blocks: Bytes, keep: Mask, codes: Bytes) -> None:
        blocks[..., KEPT:QS] = np.packbits(keep, axis=-1, bitorder="little")
        some = codes[keep].reshape(*blocks.shape[:2], n // 2, 2).view(np.uint8) & 15
        blocks[..., QS:] = some[..., 0] | some[..., 1] << 4

    def codes_of(blocks: Bytes) -> Bytes:
        keep = np.unpackbits(blocks[..., KEPT:QS], axis=-1, bitorder="little").astype(bool)
        codes = np.zeros((*blocks.shape[:2], BLOCK + 1), np.uint8)
        codes[..., 0:n:2], codes[..., 1:n:2] = blocks[..., QS:] & 15, blocks[..., QS:] >> 4
        place = np.cumsum(keep, axis=-1) - 1
        found: Bytes = np.where(keep, np.take_along_axis(codes, np.maximum(place, 0), axis=-1), 0)
        return found

    return format_of(
        f"s{n}of32_g32", "n_of_32", n, BLOCK, put=put, codes=codes_of, unpack=_UNPACK[n]
    )


FORMATS = tuple(make(n) for n in COUNTS)
