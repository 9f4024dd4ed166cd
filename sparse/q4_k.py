"""Q4_K: 256 weights in 8 sub-blocks of 32, each with a 6-bit scale and minimum. 4.5 bits.

A weight of sub-block s is `(d * scale[s]) * code - dmin * min[s]`, code 0..15.
Source: `block_q4_K` of ggml-common.h; `quantize_row_q4_K_ref`, `make_qkx2_quants` and
`get_scale_min_k4` of ggml-quants.c.

Row block, 144 bytes (raw):
    bytes      what
    0..1       d, float16
    2..3       dmin, float16
    4..7       scale[0..3] (bits 0..5) | bits 4..5 of scale[4..7] (bits 6..7)
    8..11      min[0..3] (bits 0..5) | bits 4..5 of min[4..7] (bits 6..7)
    12..15     bits 0..3 of scale[4..7] (low nibble) | of min[4..7] (high nibble)
    16..143    qs: byte 32p + b = code of input 64p + b (low nibble), which is in sub-block 2p,
               | of input 64p + 32 + b (high nibble), in sub-block 2p + 1; p = 0..3

Tile block, 2368 bytes (16 rows r):
    bytes                        what
    2r .. 2r+1                   d of row r
    32 + 2r .. 32 + 2r+1         dmin of row r
    64 + 32s + r                 scale[s] of row r, one byte
    80 + 32s + r                 min[s] of row r, one byte
    320 + 512p + 64j + 4r + i    qs byte 32p + 4j + i of row r; j = 0..7, i = 0..3
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
from headrace.sparse.grid import Grid
from headrace.sparse.interleaving import interleave_words, load_eights, spread_scales
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
    f32,
    fma,
    fma_outer,
    get_f16,
    get_u8,
    load_f16,
    load_q8,
    load_u8_i32,
    outer,
    put_f32,
    q8_f32,
    repeat,
    shr_u8,
    splat_f32,
    splat_i32,
    to_f32,
)

BLOCK_BYTES = 144
RUNS = ((2, 2), (2, 2), (16, 1), (128, 4))


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise by ggml's reference search over 21 steps per sub-block, without importances."""
    return encode_blocks(x, BLOCK_BYTES, _encode_blocks)


def _encode_blocks(blocks: Floats) -> Bytes:
    # [n, 256] -> [n, 144]
    x = sub_blocks(blocks, 32)
    scale, low, codes = search_with_minimum(x, spread_weights(x), 15, -1, 21)
    d, scale_codes = six_bits(scale.reshape(-1, 8))
    dmin, low_codes = six_bits(low.reshape(-1, 8))
    step = (halves(d) * scale_codes).ravel()
    offset = (halves(dmin) * low_codes).ravel()
    again = np.rint((x + offset) / step).clip(0, 15)
    codes = np.where(step == 0, codes, again).astype(np.uint8)
    packed = pack_nibbles(np.ascontiguousarray(codes.T).reshape(-1, 4, 64)).reshape(-1, 128)
    return np.concatenate([d, dmin, pack_scales(scale_codes, low_codes), packed], axis=-1)


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    scale, low = unpack_scales(blocks[..., 4:16])
    scales = (halves(blocks[..., 0:2]) * scale)[..., None]  # (rows, n_blocks, 8, 1)
    lows = (halves(blocks[..., 2:4]) * low)[..., None]
    packed = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    codes = unpack_nibbles(packed).reshape(*blocks.shape[:2], 8, 32).astype(np.float32)
    return as_rows((scales * codes - lows).reshape(*blocks.shape[:2], BLOCK))


def _scales(raw: Bytes) -> tuple[Floats, Floats]:
    # [rows, sub-blocks]: what `decode` multiplies a code by, and adds to it.
    blocks = byte_blocks(raw, BLOCK_BYTES)
    scale, low = unpack_scales(blocks[..., 4:16])
    scales = as_rows(halves(blocks[..., 0:2]) * scale)
    return scales, -as_rows(halves(blocks[..., 2:4]) * low)


def _put(raw: Bytes, codes: Bytes) -> Bytes:
    blocks = byte_blocks(raw, BLOCK_BYTES).copy()
    pairs = codes.reshape(*blocks.shape[:2], 4, 64)
    blocks[..., 16:] = pack_nibbles(pairs).reshape(*blocks.shape[:2], 128)
    return as_rows(blocks)


# Scales of scales are found by ggml's search, which heeds no importance of inputs.
GRID = Grid(
    group=32,
    levels=tuple(map(float, range(16))),
    fit=lambda x, importance: encode(x),
    scales=_scales,
    put=_put,
)


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows and give every 6-bit scale and minimum its byte: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    scales = np.stack(unpack_scales(blocks[..., 4:16]), axis=-1)  # (rows, n_blocks, 8, 2)
    bytewise = scales.reshape(*blocks.shape[:2], 16)
    return interleave(np.concatenate([blocks[..., :4], bytewise, blocks[..., 16:]], axis=-1), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    packed = pack_scales(blocks[..., 4:20:2], blocks[..., 5:20:2])
    return as_rows(np.concatenate([blocks[..., :4], packed, blocks[..., 20:]], axis=-1))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    less = splat_f32(0.0) - load_f16(w + 32, tiles, stride)
    for p in range(4):
        low = dot_init(repeat(splat_i32(0), tokens), tiles)
        high = dot_init(repeat(splat_i32(0), tokens), tiles)
        first = load_q8(x + 2 * p * (48 * group), tokens)
        second = load_q8(x + (2 * p + 1) * (48 * group), tokens)
        codes = w + (320 + 512 * p)
        v = load_eights(codes, tiles, stride)
        low = dot8(low, and_u8(v, 15), first, 0, 4)
        high = dot8(high, shr_u8(v, 4), second, 0, 4)
        v = load_eights(codes + 128, tiles, stride)
        low = dot8(low, and_u8(v, 15), first, 8, 4)
        high = dot8(high, shr_u8(v, 4), second, 8, 4)
        v = load_eights(codes + 256, tiles, stride)
        low = dot8(low, and_u8(v, 15), first, 16, 4)
        high = dot8(high, shr_u8(v, 4), second, 16, 4)
        v = load_eights(codes + 384, tiles, stride)
        low = dot8(low, and_u8(v, 15), first, 24, 4)
        high = dot8(high, shr_u8(v, 4), second, 24, 4)
        at = w + (64 + 64 * p)
        scale = outer(d * to_f32(load_u8_i32(at, tiles, stride)), q8_f32(first, 32))
        acc = fma(scale, to_f32(dot_result(low, 4)), acc)
        least = less * to_f32(load_u8_i32(at + 16, tiles, stride))
        acc = fma_outer(least, q8_f32(first, 36), acc)
        scale = outer(d * to_f32(load_u8_i32(at + 32, tiles, stride)), q8_f32(second, 32))
        acc = fma(scale, to_f32(dot_result(high, 4)), acc)
        least = less * to_f32(load_u8_i32(at + 48, tiles, stride))
        acc = fma_outer(least, q8_f32(second, 36), acc)
    return acc


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    spread_scales(src, row_bytes, dst)
    interleave_words(src + 16, row_bytes, dst + 320, 32)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    dmin = get_f16(w + (32 + lane * 2))
    for s in range(8):
        scale = d * f32(get_u8(w + (64 + 32 * s + lane)))
        low = dmin * f32(get_u8(w + (80 + 32 * s + lane)))
        for i in range(32):
            code = get_u8(w + (320 + s // 2 * 512 + i // 4 * 64 + lane * 4 + i % 4))
            code = (code >> (4 * (s % 2))) & 15
            put_f32(out + (32 * s + i) * 4, scale * f32(code) - low)


FORMAT = Format(
    name="q4_k",
    ggml_type="Q4_K",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=2368,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
    grid=GRID,
)
