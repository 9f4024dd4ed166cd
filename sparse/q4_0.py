"""Q4_0: 32 weights share a float16 scale `d`; a weight is `d * (code - 8)`, code 0..15. 4.5 bits.

Source: `block_q4_0` of ggml-common.h, `quantize_row_q4_0_ref` of ggml-quants.c.

Row block, 18 bytes (raw):
    bytes      what
    0..1       d, float16
    2..17      qs: byte b = code of input b (low nibble) | code of input 16 + b (high nibble)

Tile block, 288 bytes (16 rows r, 4 groups j of 4 bytes i):
    bytes                 what
    2r .. 2r+1            d of row r
    32 + 64j + 4r + i     qs byte 4j + i of row r: input 4j + i low, input 16 + 4j + i high
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
    pack_nibbles,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_halves, interleave_words, load_eights
from headrace.targets.simd import (
    and_u8,
    dot16,
    dot_init,
    dot_result,
    f32,
    fma,
    get_f16,
    get_u8,
    load_f16,
    load_q8,
    outer,
    put_f32,
    q8_f32,
    q8_shifted,
    shr_u8,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 18
RUNS = ((2, 2), (16, 4))


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the weight of largest magnitude at code 0, as ggml does."""
    blocks = weight_blocks(x, BLOCK)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    d = np.take_along_axis(blocks, at, axis=-1) / -8  # (rows, n_blocks, 1)
    inverse = np.where(d == 0, np.float32(0), 1 / d)
    codes = np.trunc(blocks * inverse + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return as_rows(np.concatenate([half_bytes(d), pack_nibbles(codes)], axis=-1))


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    codes = unpack_nibbles(blocks[..., 2:]).astype(np.int8) - np.int8(8)
    return as_rows(halves(blocks[..., :2]) * codes.astype(np.float32))


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[..., 2:] = pack_nibbles(codes)


GRID = scaled_grid(BLOCK, BLOCK_BYTES, range(-8, 8), _put)


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    return interleave(byte_blocks(raw, BLOCK_BYTES), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    entry = load_q8(x, tokens)
    total = dot_init(q8_shifted(entry, 40, 3), tiles)
    v = load_eights(w + 32, tiles, stride)
    total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 0, 4)
    v = load_eights(w + 160, tiles, stride)
    total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 8, 4)
    scale = outer(load_f16(w, tiles, stride), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 4)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)
    interleave_words(src + 2, row_bytes, dst + 32, 4)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 32 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for i in range(16):
        code = get_u8(w + (32 + i // 4 * 64 + lane * 4 + i % 4))
        put_f32(out + i * 4, d * f32((code & 15) - 8))
        put_f32(out + (16 + i) * 4, d * f32((code >> 4) - 8))


FORMAT = Format(
    name="q4_0",
    ggml_type="Q4_0",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=288,
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
