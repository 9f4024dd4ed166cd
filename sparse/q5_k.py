"""Q5_K: 256 weights in 8 sub-blocks of 32, each with a 6-bit scale and minimum. 5.5 bits.

A weight of sub-block s is `(d * scale[s]) * code - dmin * min[s]`, code 0..31.
Source: `block_q5_K` of ggml-common.h; `quantize_row_q5_K_ref` of ggml-quants.c.

Row block, 176 bytes (raw):
    bytes      what
    0..15      d, dmin, scales and minimums as in Q4_K
    16..47     qh: bit s of byte 16 + b = bit 4 of the code of input 32s + b, s = 0..7
    48..175    qs: byte 32p + b = bits 0..3 of input 64p + b (low nibble), which is in sub-block 2p,
               | of input 64p + 32 + b (high nibble), in sub-block 2p + 1; p = 0..3

Tile block, 2880 bytes (16 rows r, sub-blocks s = 0..7, i = 0..3):
    bytes                           what
    2r .. 2r+1                      d of row r
    32 + 2r .. 32 + 2r+1            dmin of row r
    64 + 32s + r                    scale[s] of row r, one byte
    80 + 32s + r                    min[s] of row r, one byte
    320 + 320s + 4r + i             bit g = bit 4 of the code of input 32s + 4g + i, g = 0..7
    384 + 320s + 64j + 4r + i       bits 0..3 of input 32s + 4j + i (low nibble) and of input
                                    32s + 16 + 4j + i (high nibble) of row r, j = 0..3

So a sub-block lies as a block of Q5_0 does: the low nibbles of group j go with bit j of the high
bits, the high nibbles with bit 4 + j, lane by lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.format import (
    Bytes,
    Floats,
    Format,
    as_rows,
    byte_blocks,
    deinterleave,
    halves,
    interleave,
    pack_nibbles,
    unpack_nibbles,
)
from headrace.sparse.interleaving import load_eights, regroup_nibbles, spread_scales
from headrace.sparse.k_quants import (
    BLOCK,
    encode_blocks,
    pack_scales,
    search_with_minimum,
    six_bits,
    spread_weights,
    sub_blocks,
    unpack_scales,
)
from headrace.targets.simd import (
    and_u8,
    dot8,
    dot_init,
    dot_result,
    eights,
    f32,
    fma,
    fma_outer,
    get_f16,
    get_u8,
    load_f16,
    load_q8,
    load_runs,
    load_u8,
    load_u8_i32,
    outer,
    part,
    put_f32,
    q8_f32,
    repeat,
    shl_u8,
    shr_u8,
    splat_f32,
    splat_i32,
    store_u8,
    to_f32,
)

BLOCK_BYTES = 176
RUNS = ((2, 2), (2, 2), (16, 1), *((4, 4), (16, 4)) * 8)


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise by ggml's reference search over 16 steps per sub-block, without importances."""
    return encode_blocks(x, BLOCK_BYTES, _encode_blocks)


def _encode_blocks(blocks: Floats) -> Bytes:
    # [n, 256] -> [n, 176]
    x = sub_blocks(blocks, 32)
    scale, low, codes = search_with_minimum(x, spread_weights(x), 31, -0.5, 16)
    d, scale_codes = six_bits(scale.reshape(-1, 8))
    dmin, low_codes = six_bits(low.reshape(-1, 8))
    step = (halves(d) * scale_codes).ravel()
    offset = (halves(dmin) * low_codes).ravel()
    again = np.rint((x + offset) / step).clip(0, 31)
    codes = np.where(step == 0, codes, again).astype(np.uint8)
    by_block = np.ascontiguousarray(codes.T).reshape(-1, 8, 32)
    return np.concatenate([d, dmin, pack_scales(scale_codes, low_codes), _pack(by_block)], axis=-1)


def _pack(codes: Bytes) -> Bytes:
    # Codes [..., 8, 32] -> qh and qs [..., 160].
    shape = codes.shape[:-2]
    high = np.packbits(codes >> 4, axis=-2, bitorder="little").reshape(*shape, 32)
    low = pack_nibbles((codes & 0x0F).reshape(*shape, 4, 64)).reshape(*shape, 128)
    return np.concatenate([high, low], axis=-1)


def _unpack(packed: Bytes) -> Bytes:
    # Undoes `_pack`.
    shape = packed.shape[:-1]
    high = np.unpackbits(packed[..., None, :32], axis=-2, bitorder="little")
    low = unpack_nibbles(packed[..., 32:].reshape(*shape, 4, 32)).reshape(*shape, 8, 32)
    codes: Bytes = low | (high << 4)
    return codes


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    scale, low = unpack_scales(blocks[..., 4:16])
    scales = (halves(blocks[..., 0:2]) * scale)[..., None]  # (rows, n_blocks, 8, 1)
    lows = (halves(blocks[..., 2:4]) * low)[..., None]
    codes = _unpack(blocks[..., 16:]).astype(np.float32)
    return as_rows((scales * codes - lows).reshape(*blocks.shape[:2], BLOCK))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows, each sub-block as a block of Q5_0: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    scales = np.stack(unpack_scales(blocks[..., 4:16]), axis=-1)  # (rows, n_blocks, 8, 2)
    codes = _unpack(blocks[..., 16:])
    groups = codes.reshape(*shape, 8, 8, 4)  # (.., s, g, i)
    high = np.packbits(groups >> 4, axis=-2, bitorder="little").reshape(*shape, 8, 4)
    both = np.concatenate([high, pack_nibbles(codes & 0x0F)], axis=-1)
    ordered = [blocks[..., :4], scales.reshape(*shape, 16), both.reshape(*shape, 160)]
    return interleave(np.concatenate(ordered, axis=-1), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    shape = blocks.shape[:2]
    both = blocks[..., 20:].reshape(*shape, 8, 20)
    high = np.unpackbits(both[..., None, :4], axis=-2, bitorder="little").reshape(*shape, 8, 32)
    codes = unpack_nibbles(both[..., 4:]) | (high << 4)
    packed = pack_scales(blocks[..., 4:20:2], blocks[..., 5:20:2])
    return as_rows(np.concatenate([blocks[..., :4], packed, _pack(codes)], axis=-1))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    less = splat_f32(0.0) - load_f16(w + 32, tiles, stride)
    for s in range(8):
        entry = load_q8(x + s * (48 * group), tokens)
        codes = w + (320 + 320 * s)
        total = dot_init(repeat(splat_i32(0), tokens), tiles)
        high = load_u8(codes, tiles, stride)
        # Bit g of a byte of `high` belongs to inputs 4g..4g+3: bring it to bit 4 of their codes.
        h = eights(high, shr_u8(high, 1))
        v = load_eights(codes + 64, tiles, stride)
        total = dot8(total, and_u8(v, 15) | and_u8(shl_u8(h, 4), 16), entry, 0, 5)
        total = dot8(total, shr_u8(v, 4) | and_u8(h, 16), entry, 16, 5)
        v = load_eights(codes + 192, tiles, stride)
        total = dot8(total, and_u8(v, 15) | and_u8(shl_u8(h, 2), 16), entry, 8, 5)
        total = dot8(total, shr_u8(v, 4) | and_u8(shr_u8(h, 2), 16), entry, 24, 5)
        scale = d * to_f32(load_u8_i32(w + (64 + 32 * s), tiles, stride))
        acc = fma(outer(scale, q8_f32(entry, 32)), to_f32(dot_result(total, 5)), acc)
        least = less * to_f32(load_u8_i32(w + (80 + 32 * s), tiles, stride))
        acc = fma_outer(least, q8_f32(entry, 36), acc)
    return acc


def _low_bits(a: Any, b: Any, bits: Any, mask: Any) -> Any:
    """The bits of a under `mask`, and above them those of b."""
    return and_u8(a, mask) | shl_u8(and_u8(b, mask), bits)


def _high_bits(a: Any, b: Any, bits: Any, mask: Any) -> Any:
    """The bits of b under `mask`, and below them those of a."""
    return shr_u8(and_u8(a, mask), bits) | and_u8(b, mask)


def _store_bits(four: Any, dst: Any) -> None:
    """The last two steps of a transposition of bits, of 4 vectors."""
    a, b, c, d = part(four, 0), part(four, 1), part(four, 2), part(four, 3)
    first, third = _low_bits(a, c, 2, 0x33), _high_bits(a, c, 2, 0xCC)
    second, fourth = _low_bits(b, d, 2, 0x33), _high_bits(b, d, 2, 0xCC)
    store_u8(dst, _low_bits(first, second, 1, 0x55))
    store_u8(dst + 320, _high_bits(first, second, 1, 0xAA))
    store_u8(dst + 640, _low_bits(third, fourth, 1, 0x55))
    store_u8(dst + 960, _high_bits(third, fourth, 1, 0xAA))


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    spread_scales(src, row_bytes, dst)
    # Bit s of vector g becomes bit g of vector s.
    first = load_runs(src + 16, row_bytes, 4)
    second = load_runs(src + 32, row_bytes, 4)
    _store_bits(_low_bits(first, second, 4, 15), dst + 320)
    _store_bits(_high_bits(first, second, 4, 240), dst + 1600)
    for p in range(4):
        to = dst + (384 + 640 * p)
        regroup_nibbles(src + (48 + 32 * p), row_bytes, to, to + 320)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    dmin = get_f16(w + (32 + lane * 2))
    for s in range(8):
        scale = d * f32(get_u8(w + (64 + 32 * s + lane)))
        low = dmin * f32(get_u8(w + (80 + 32 * s + lane)))
        codes = w + (320 + 320 * s + lane * 4)
        for i in range(32):
            nibbles = get_u8(codes + (64 + i % 16 // 4 * 64 + i % 4))
            high = (get_u8(codes + i % 4) >> (i // 4)) & 1
            code = ((nibbles >> (i // 16 * 4)) & 15) | (high << 4)
            put_f32(out + (32 * s + i) * 4, scale * f32(code) - low)


FORMAT = Format(
    name="q5_k",
    ggml_type="Q5_K",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=2880,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
)
