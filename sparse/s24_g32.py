"""2:4 sparsity: of each 4 weights of a row 2 are kept, in 4 bits, a scale for 32: 3.5 bits.

For comparison with group sparsity (`headrace.sparse.gqs`): the pattern that tensor cores of GPUs
take. CPUs have no such products, so a tile is made dense in the cache before it is multiplied, and
all that is saved is memory traffic: 3.5 bits a weight instead of the 4.5 of `i4_g32`. The layout is
ours.

Row block (raw) of 32 weights, 14 bytes:
    field       bytes   what
    d           2       float16
    places      4       nibble q, the lowest first: where the two kept weights of weights 4q..4q+3
                        are, the first in bits 0..1, the second in bits 2..3
    qs          8       byte q: their codes, the first low; a weight is d * code, -8..7 as two's
                        complement. Codes of the same place are combined by exclusive or.

Tile block, and the plain form, which is multiplied: those of `headrace.sparse.dense_int8`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.dense_int8 import KEPT, QS, format_of
from headrace.sparse.format import Bytes
from headrace.sparse.pattern import Mask
from headrace.targets.simd import (
    bits_u8,
    load_f16,
    load_i32,
    shl,
    shl_by,
    shr,
    splat_i32,
    store_f32,
    store_u8,
)


def _put(blocks: Bytes, keep: Mask, codes: Bytes) -> None:
    shape = blocks.shape[:2]
    places = np.nonzero(keep.reshape(-1, 4))[1].reshape(*shape, 8, 2)
    fours = codes.reshape(*shape, 8, 4)
    nibbles = np.take_along_axis(fours, places, axis=-1).view(np.uint8) & 15
    both = (places[..., 0] | places[..., 1] << 2).astype(np.uint8)
    blocks[..., KEPT:QS] = both[..., 0::2] | both[..., 1::2] << 4
    blocks[..., QS:] = nibbles[..., 0] | nibbles[..., 1] << 4


def _codes(blocks: Bytes) -> Bytes:
    at = np.arange(4, dtype=np.uint8)
    both = np.stack([blocks[..., KEPT:QS] & 15, blocks[..., KEPT:QS] >> 4], axis=-1)
    both = both.reshape(*blocks.shape[:2], 8, 1)
    some = blocks[..., QS:, None]
    found = np.where(both & 3 == at, some & 15, 0) ^ np.where(both >> 2 == at, some >> 4, 0)
    return found.reshape(*blocks.shape[:2], 32)


def _four(q: int) -> Any:
    """The function that makes weights 4q .. 4q + 3 of 16 rows dense, as bytes code + 8."""
    at_low, at_high = 8 * (q % 4), 8 * (q % 4) + 4
    at_first, at_second = max(4 * q - 3, 0), max(4 * q - 1, 0)

    def four(places: Any, codes: Any, out: Any) -> None:
        mask = splat_i32(24)  # places in bits
        if q == 0:
            first, second = shl(places, 3) & mask, shl(places, 1) & mask
        else:
            first, second = shr(places, at_first) & mask, shr(places, at_second) & mask
        nibble = splat_i32(15)
        low, high = shr(codes, at_low) & nibble, shr(codes, at_high) & nibble
        dense = shl_by(low, first) ^ shl_by(high, second) ^ splat_i32(0x08080808)
        store_u8(out + (64 + 64 * q), bits_u8(dense))

    return four


_0, _1, _2, _3, _4, _5, _6, _7 = (_four(q) for q in range(8))


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    store_f32(out, load_f16(w, 1, 0), 0)
    places = load_i32(w + 32, 1, 0)
    codes = load_i32(w + 96, 1, 0)
    _0(places, codes, out)
    _1(places, codes, out)
    _2(places, codes, out)
    _3(places, codes, out)
    codes = load_i32(w + 160, 1, 0)
    _4(places, codes, out)
    _5(places, codes, out)
    _6(places, codes, out)
    _7(places, codes, out)


FORMAT = format_of("s24_g32", "s24_g32", 2, 4, put=_put, codes=_codes, unpack=unpack)
