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

Tile block: 16 times d, then `places` and the two halves of `qs` of 16 rows in runs of 4 bytes. The
plain form, which is multiplied, has d as float32 and then bytes code + 8 of all 32 inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.format import (
    Bytes,
    Floats,
    Format,
    Unpacked,
    as_rows,
    byte_blocks,
    deinterleave,
    half_bytes,
    halves,
    interleave,
    weight_blocks,
)
from headrace.sparse.grid import inverse
from headrace.sparse.interleaving import interleave_halves, load_eights
from headrace.sparse.scale_search import half, search_groups
from headrace.targets.simd import (
    bits_u8,
    dot8,
    dot_init,
    dot_result,
    f32,
    fma,
    get_f32,
    get_u8,
    get_u16,
    load_f16,
    load_f32,
    load_i32,
    load_q8,
    outer,
    put_f32,
    put_u16,
    q8_f32,
    q8_shifted,
    shl,
    shl_by,
    shr,
    splat_i32,
    store_f32,
    store_u8,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 14
RUNS = ((2, 2), (4, 4), (8, 4))
LEVELS = tuple(map(float, range(-8, 8)))


def kept(size: Floats) -> Bytes:
    """The places of the two largest of each four, the lower first: [..., n] to [..., n / 4, 2]."""
    fours = size.reshape(*size.shape[:-1], -1, 4)
    order = np.argsort(-fours, axis=-1, kind="stable")[..., :2]
    return np.sort(order, axis=-1).astype(np.uint8)


def encode(x: Floats) -> Bytes:
    """Keep the larger weights; quantise them to nearest with searched scales."""
    blocks = weight_blocks(x, BLOCK)
    places = kept(np.abs(blocks))
    fours = blocks.reshape(*places.shape[:-1], 4)
    values = np.take_along_axis(fours, places.astype(np.int64), axis=-1)
    shape = blocks.shape[:2]
    raw = np.zeros((*shape, BLOCK_BYTES), np.uint8)
    d = search_groups(values.reshape(len(x), -1), None, BLOCK // 2, LEVELS, half).reshape(shape)
    raw[..., :2] = half_bytes(d[..., None])
    codes = np.clip(np.rint(values * inverse(d)[..., None, None]), -8, 7).astype(np.int8)
    nibbles = codes.view(np.uint8) & 15
    both = places[..., 0] | places[..., 1] << 2
    raw[..., 2:6] = both[..., 0::2] | both[..., 1::2] << 4
    raw[..., 6:] = nibbles[..., 0] | nibbles[..., 1] << 4
    return as_rows(raw)


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    at = np.arange(4, dtype=np.uint8)
    both = np.stack([blocks[..., 2:6] & 15, blocks[..., 2:6] >> 4], axis=-1)
    both = both.reshape(*blocks.shape[:2], 8, 1)
    codes = blocks[..., 6:, None]
    found = np.where(both & 3 == at, codes & 15, 0) ^ np.where(both >> 2 == at, codes >> 4, 0)
    signed = (found.astype(np.int8) ^ 8) - 8
    d = halves(blocks[..., :2])
    return as_rows(d * signed.reshape(*blocks.shape[:2], BLOCK).astype(np.float32))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    return interleave(byte_blocks(raw, BLOCK_BYTES), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)
    for row in range(16):
        for i in range(6):
            word = get_u16(src + (row * row_bytes + 2 + 2 * i))
            put_u16(dst + (32 + i // 2 * 64 + row * 4 + i % 2 * 2), word)


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


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one plain block of `tiles` tiles times `tokens` tokens."""
    entry = load_q8(x, tokens)
    total = dot_init(q8_shifted(entry, 40, 3), tiles)
    total = dot8(total, load_eights(w + 64, tiles, stride), entry, 0, 4)
    total = dot8(total, load_eights(w + 192, tiles, stride), entry, 8, 4)
    total = dot8(total, load_eights(w + 320, tiles, stride), entry, 16, 4)
    total = dot8(total, load_eights(w + 448, tiles, stride), entry, 24, 4)
    scale = outer(load_f32(w, tiles, stride), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 4)), acc)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The weights of row `lane` of a plain block."""
    scale = get_f32(w + lane * 4)
    for i in range(BLOCK):
        code = get_u8(w + (64 + i // 4 * 64 + lane * 4 + i % 4)) - 8
        put_f32(out + i * 4, scale * f32(code))


FORMAT = Format(
    name="s24_g32",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=16 * BLOCK_BYTES,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
    unpacked=Unpacked(tile_block_bytes=64 + 16 * BLOCK, unpack=unpack),
)
