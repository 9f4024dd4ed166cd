"""TQ2_0: 256 ternary weights share a float16 scale `d`; one is `d * (code - 1)`. 2.0625 bits.

Codes are 0..2; 3 is what its bits say.
Source: `block_tq2_0` of ggml-common.h, `quantize_row_tq2_0_ref` of ggml-quants.c.

Row block, 66 bytes (raw), halves h = 0..1 of 128 inputs, b = 0..31:
    bytes         what
    32h + b       qs: bits 2k..2k+1 = code of input 128h + 32k + b, k = 0..3
    64..65        d, float16

Tile block, 1056 bytes (16 rows r, chunks c = 0..7 of 32 inputs, i = 0..3):
    bytes                           what
    2r .. 2r+1                      d of row r
    32 + 128c + 64v + 4r + i        bits 2k..2k+1 = code of input 32c + 16v + 4k + i of row r,
                                    k = 0..3, v = 0..1
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.block_grid import scaled_grid
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
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_halves, transpose_pairs
from headrace.targets.simd import (
    and_u8,
    dot8,
    dot_init,
    dot_result,
    eights,
    f32,
    fma,
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
    q8_i32,
    shr_u8,
    to_f32,
)

BLOCK = 256
BLOCK_BYTES = 66
RUNS = ((2, 2), (64, 4))
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Round to multiples of the largest magnitude, halves away from zero."""
    blocks = weight_blocks(x, BLOCK)
    d = np.abs(blocks).max(axis=-1, keepdims=True)
    scaled = blocks * np.where(d == 0, np.float32(0), 1 / d)
    codes = (np.sign(scaled) * (np.abs(scaled) >= 0.5) + 1).astype(np.uint8)
    return as_rows(join(codes, half_bytes(d)))


def join(codes: Bytes, d: Bytes) -> Bytes:
    """Build row blocks from codes 0..3 [rows, n_blocks, 256] and the bytes of d [.., 2]."""
    parts = codes.reshape(*codes.shape[:2], 2, 4, 32) << _SHIFTS[:, None]
    packed = np.bitwise_or.reduce(parts, axis=-2).reshape(*codes.shape[:2], 64)
    return np.concatenate([packed, d], axis=-1)


def _codes(packed: Bytes) -> Bytes:
    # In the order of the inputs: [rows, n_blocks, 64] -> [rows, n_blocks, 256].
    parts = packed.reshape(*packed.shape[:2], 2, 1, 32) >> _SHIFTS[:, None] & 3
    codes: Bytes = parts.reshape(*packed.shape[:2], BLOCK)
    return codes


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    codes = _codes(blocks[..., :64]).astype(np.float32) - 1
    return as_rows(halves(blocks[..., 64:]) * codes)


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[:] = join(codes, blocks[..., 64:])


GRID = scaled_grid(BLOCK, BLOCK_BYTES, (-1, 0, 1), _put, field=slice(64, 66))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows, the codes in the order of the inputs: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    quads = _codes(blocks[..., :64]).reshape(*shape, 16, 4, 4) << _SHIFTS[:, None]
    packed = np.bitwise_or.reduce(quads, axis=-2).reshape(*shape, 64)
    return interleave(np.concatenate([blocks[..., 64:], packed], axis=-1), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    shape = blocks.shape[:2]
    codes = blocks[..., 2:].reshape(*shape, 16, 1, 4) >> _SHIFTS[:, None] & 3
    return as_rows(join(codes.reshape(*shape, BLOCK), blocks[..., :2]))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    for c in range(8):
        entry = load_q8(x + c * (48 * group), tokens)
        codes = w + (32 + 128 * c)
        total = dot_init(q8_i32(entry, 40), tiles)
        v = load_u8(codes, tiles, stride)
        total = dot8(total, and_u8(eights(v, shr_u8(v, 2)), 3), entry, 0, 4)
        v = shr_u8(v, 4)
        total = dot8(total, and_u8(eights(v, shr_u8(v, 2)), 3), entry, 8, 4)
        v = load_u8(codes + 64, tiles, stride)
        total = dot8(total, and_u8(eights(v, shr_u8(v, 2)), 3), entry, 16, 4)
        v = shr_u8(v, 4)
        total = dot8(total, and_u8(eights(v, shr_u8(v, 2)), 3), entry, 24, 4)
        acc = fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, 4)), acc)
    return acc


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    for h in range(2):
        for v in range(2):
            codes = load_runs(src + (32 * h + 16 * v), row_bytes, 4)
            a, b, c, d = part(codes, 0), part(codes, 1), part(codes, 2), part(codes, 3)
            transpose_pairs(a, b, c, d, dst + (32 + 512 * h + 64 * v), 128)
    interleave_halves(src + 64, row_bytes, dst)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for i in range(256):
        byte = get_u8(w + (32 + i // 16 * 64 + lane * 4 + i % 4))
        put_f32(out + i * 4, d * f32(((byte >> (i % 16 // 4 * 2)) & 3) - 1))


FORMAT = Format(
    name="tq2_0",
    ggml_type="TQ2_0",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=1056,
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
