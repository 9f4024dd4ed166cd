"""Q5_1: 32 weights share a float16 scale `d` and minimum `m`; a weight is `d * code + m`. 6 bits.

Source: `block_q5_1` of ggml-common.h, `quantize_row_q5_1_ref` of ggml-quants.c.

Row block, 24 bytes (raw), codes 0..31:
    bytes      what
    0..1       d, float16
    2..3       m, float16
    4..7       qh, little-endian 32 bits: bit b = bit 4 of the code of input b
    8..23      qs: byte b = bits 0..3 of input b (low nibble) | of input 16 + b (high nibble)

Tile block, 384 bytes (16 rows r, 4 groups j of 4 bytes i):
    bytes                 what
    2r .. 2r+1            d of row r
    32 + 2r .. 32 + 2r+1  m of row r
    64 + 4r + i           bit g = bit 4 of the code of input 4g + i of row r, g = 0..7
    128 + 64j + 4r + i    qs byte 4j + i of row r: input 4j + i low, input 16 + 4j + i high
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.block_grid import affine_grid
from headrace.sparse.format import (
    Bytes,
    Floats,
    Format,
    as_rows,
    byte_blocks,
    deinterleave,
    half_bytes,
    halves,
    interleave,
    pack_nibbles,
    transpose_bits,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_words, load_eights, regroup_bits
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
    outer,
    part,
    put_f32,
    q8_f32,
    repeat,
    shl_u8,
    shr_u8,
    splat_i32,
    store_u8,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 24
RUNS = ((2, 2), (2, 2), (4, 4), (16, 4))


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the smallest weight at code 0 and the largest at 31, as ggml does."""
    blocks = weight_blocks(x, BLOCK)
    m = blocks.min(axis=-1, keepdims=True)  # (rows, n_blocks, 1)
    d = (blocks.max(axis=-1, keepdims=True) - m) / 31
    inverse = np.where(d == 0, np.float32(0), 1 / d)
    codes = np.trunc((blocks - m) * inverse + np.float32(0.5)).astype(np.uint8).clip(0, 31)
    high = np.packbits(codes >> 4, axis=-1, bitorder="little")
    parts = [half_bytes(d), half_bytes(m), high, pack_nibbles(codes & 0x0F)]
    return as_rows(np.concatenate(parts, axis=-1))


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    high = np.unpackbits(blocks[..., 4:8], axis=-1, bitorder="little")
    codes = (unpack_nibbles(blocks[..., 8:]) | (high << 4)).astype(np.float32)
    return as_rows(halves(blocks[..., :2]) * codes + halves(blocks[..., 2:4]))


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[..., 4:8] = np.packbits(codes >> 4, axis=-1, bitorder="little")
    blocks[..., 8:] = pack_nibbles(codes & 0x0F)


GRID = affine_grid(BLOCK, BLOCK_BYTES, 31, _put)


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES).copy()
    blocks[..., 4:8] = transpose_bits(blocks[..., 4:8], 8)
    return interleave(blocks, RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    blocks[..., 4:8] = transpose_bits(blocks[..., 4:8], 4)
    return as_rows(blocks)


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    entry = load_q8(x, tokens)
    high = load_u8(w + 64, tiles, stride)
    total = dot_init(repeat(splat_i32(0), tokens), tiles)
    # Bit g of a byte of `high` belongs to inputs 4g..4g+3: bring it to bit 4 of their codes.
    h = eights(high, shr_u8(high, 1))
    v = load_eights(w + 128, tiles, stride)
    total = dot8(total, and_u8(v, 15) | and_u8(shl_u8(h, 4), 16), entry, 0, 5)
    total = dot8(total, shr_u8(v, 4) | and_u8(h, 16), entry, 16, 5)
    v = load_eights(w + 256, tiles, stride)
    total = dot8(total, and_u8(v, 15) | and_u8(shl_u8(h, 2), 16), entry, 8, 5)
    total = dot8(total, shr_u8(v, 4) | and_u8(shr_u8(h, 2), 16), entry, 24, 5)
    scale = outer(load_f16(w, tiles, stride), q8_f32(entry, 32))
    acc = fma(scale, to_f32(dot_result(total, 5)), acc)
    return fma_outer(load_f16(w + 32, tiles, stride), q8_f32(entry, 36), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    store_u8(dst, part(load_runs(src, row_bytes, 2), 0))  # d and m
    regroup_bits(part(load_runs(src, row_bytes, 4), 1), dst + 64)
    interleave_words(src + 8, row_bytes, dst + 128, 4)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 32 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    m = get_f16(w + (32 + lane * 2))
    for i in range(16):
        low = get_u8(w + (128 + i // 4 * 64 + lane * 4 + i % 4))
        high = get_u8(w + (64 + lane * 4 + i % 4))
        first = (low & 15) | (((high >> (i // 4)) & 1) << 4)
        second = (low >> 4) | (((high >> (4 + i // 4)) & 1) << 4)
        put_f32(out + i * 4, d * f32(first) + m)
        put_f32(out + (16 + i) * 4, d * f32(second) + m)


FORMAT = Format(
    name="q5_1",
    ggml_type="Q5_1",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=384,
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
