"""Q5_0: 32 weights share a float16 scale `d`; a weight is `d * (code - 16)`, code 0..31. 5.5 bits.

Source: `block_q5_0` of ggml-common.h, `quantize_row_q5_0_ref` of ggml-quants.c.

Row block, 22 bytes (raw):
    bytes      what
    0..1       d, float16
    2..5       qh, little-endian 32 bits: bit b = bit 4 of the code of input b
    6..21      qs: byte b = bits 0..3 of input b (low nibble) | of input 16 + b (high nibble)

Tile block, 352 bytes (16 rows r, 4 groups j of 4 bytes i):
    bytes                 what
    2r .. 2r+1            d of row r
    32 + 4r + i           bit g = bit 4 of the code of input 4g + i of row r, g = 0..7
    96 + 64j + 4r + i     qs byte 4j + i of row r: input 4j + i low, input 16 + 4j + i high

So the low nibbles of group j go with bit j of the high bits, the high nibbles with bit 4 + j, and
both lie in the lane where their code is: a kernel needs a shift and a mask, no shuffle.
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
    transpose_bits,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import (
    interleave_halves,
    interleave_words,
    load_eights,
    regroup_bits,
)
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
    q8_shifted,
    shl_u8,
    shr_u8,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 22
RUNS = ((2, 2), (4, 4), (16, 4))


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the weight of largest magnitude at code 0, as ggml does."""
    blocks = weight_blocks(x, BLOCK)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    d = np.take_along_axis(blocks, at, axis=-1) / -16  # (rows, n_blocks, 1)
    inverse = np.where(d == 0, np.float32(0), 1 / d)
    codes = np.trunc(blocks * inverse + np.float32(16.5)).astype(np.uint8).clip(0, 31)
    return as_rows(join(half_bytes(d), codes))


def join(d: Bytes, codes: Bytes) -> Bytes:
    """Build row blocks from the bytes of d [..., 2] and codes 0..31 [..., 32]."""
    high = np.packbits(codes >> 4, axis=-1, bitorder="little")
    return np.concatenate([d, high, pack_nibbles(codes & 0x0F)], axis=-1)


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    high = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    codes = unpack_nibbles(blocks[..., 6:]) | (high << 4)
    return as_rows(halves(blocks[..., :2]) * (codes.astype(np.float32) - 16))


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[:] = join(blocks[..., :2], codes)


GRID = scaled_grid(BLOCK, BLOCK_BYTES, range(-16, 16), _put)


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES).copy()
    blocks[..., 2:6] = transpose_bits(blocks[..., 2:6], 8)
    return interleave(blocks, RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    blocks[..., 2:6] = transpose_bits(blocks[..., 2:6], 4)
    return as_rows(blocks)


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    entry = load_q8(x, tokens)
    high = load_u8(w + 32, tiles, stride)
    total = dot_init(q8_shifted(entry, 40, 4), tiles)
    # Bit g of a byte of `high` belongs to inputs 4g..4g+3: bring it to bit 4 of their codes.
    h = eights(high, shr_u8(high, 1))
    v = load_eights(w + 96, tiles, stride)
    total = dot8(total, and_u8(v, 15) | and_u8(shl_u8(h, 4), 16), entry, 0, 5)
    total = dot8(total, shr_u8(v, 4) | and_u8(h, 16), entry, 16, 5)
    v = load_eights(w + 224, tiles, stride)
    total = dot8(total, and_u8(v, 15) | and_u8(shl_u8(h, 2), 16), entry, 8, 5)
    total = dot8(total, shr_u8(v, 4) | and_u8(shr_u8(h, 2), 16), entry, 24, 5)
    scale = outer(load_f16(w, tiles, stride), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 5)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)
    regroup_bits(part(load_runs(src + 2, row_bytes, 4), 0), dst + 32)
    interleave_words(src + 6, row_bytes, dst + 96, 4)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 32 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for i in range(16):
        low = get_u8(w + (96 + i // 4 * 64 + lane * 4 + i % 4))
        high = get_u8(w + (32 + lane * 4 + i % 4))
        first = (low & 15) | (((high >> (i // 4)) & 1) << 4)
        second = (low >> 4) | (((high >> (4 + i // 4)) & 1) << 4)
        put_f32(out + i * 4, d * f32(first - 16))
        put_f32(out + (16 + i) * 4, d * f32(second - 16))


FORMAT = Format(
    name="q5_0",
    ggml_type="Q5_0",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=352,
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
