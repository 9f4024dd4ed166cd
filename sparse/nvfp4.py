"""NVFP4: 64 weights in 4 sub-blocks of 16, each with a float8 scale. 4.5 bits.

A weight is an E2M1 number times its sub-block's scale, E4M3 without a sign. Codes stand for E2M1
numbers doubled (`headrace.sparse.lookup`), so what they are multiplied by is half of that scale. A
tensor may have a scale of its own, another tensor of the file: then see `headrace.sparse.float4`.
Source: `block_nvfp4` of ggml-common.h, `quantize_row_nvfp4_ref` of ggml-quants.c,
`ggml_ue4m3_to_fp32` and `ggml_fp32_to_ue4m3` of ggml-impl.h.

Row block, 36 bytes (raw), sub-blocks s = 0..3:
    bytes         what
    s             scale[s], E4M3
    4 + 8s + b    qs: code of input 16s + b (low nibble) | code of input 16s + 8 + b (high nibble)

Tile block, 576 bytes (16 rows r, 2 groups j of 4 bytes i):
    bytes                       what
    16s + r                     scale[s] of row r
    64 + 128s + 64j + 4r + i    qs byte 8s + 4j + i of row r: input 16s + 4j + i low,
                                input 16s + 8 + 4j + i high
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
    interleave,
    pack_nibbles,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_words, load_eights
from headrace.sparse.lookup import E2M1, E2M1_HIGH, E2M1_LOW, nearest_e2m1, table_value
from headrace.targets.simd import (
    SMALL,
    dot8,
    dot_init,
    dot_result,
    dot_start,
    f32,
    fma,
    get_e4m3,
    get_u8,
    get_u32,
    load_e4m3,
    load_q8,
    lookup16,
    outer,
    put_f32,
    put_u8,
    q8_f32,
    splat_f32,
    to_f32,
)

BLOCK = 64
BLOCK_BYTES = 36
RUNS = ((4, 1), (32, 4))


def half_scales(code: Bytes) -> Floats:
    """Half of E4M3, float32: as float16, whose exponents are 8 greater."""
    known = np.where(code == 0x7F, 0, code & 0x7F).astype(np.uint16)
    return (known << 7).view(np.float16).astype(np.float32) * 128


def nearest_e4m3(scale: Floats) -> Bytes:
    """The E4M3 next to a scale of 0 or more, halves away from zero; 448 at most."""
    bits = np.minimum(scale, np.float32(448)).view(np.uint32)
    normal = ((bits + (1 << 19)) >> 20).astype(np.int64) - (120 << 3)
    small = np.trunc(scale * 512 + np.float32(0.5)).astype(np.int64).clip(0, 7)
    return np.where(scale < 2.0**-6, small, normal).clip(0, 0x7E).astype(np.uint8)


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the largest magnitude of a sub-block at 6, as ggml does."""
    blocks = weight_blocks(x, BLOCK)
    subs = blocks.reshape(*blocks.shape[:2], 4, 16)
    scales = nearest_e4m3(np.abs(subs).max(axis=-1) / np.float32(6))
    packed = pack_nibbles(nearest_e2m1(subs, half_scales(scales)[..., None]))
    return as_rows(np.concatenate([scales, packed.reshape(*blocks.shape[:2], 32)], axis=-1))


def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    values = E2M1[unpack_nibbles(blocks[..., 4:].reshape(*shape, 4, 8))].astype(np.float32)
    return as_rows((half_scales(blocks[..., :4])[..., None] * values).reshape(*shape, BLOCK))


def _put(blocks: Bytes, codes: Bytes) -> None:
    packed = pack_nibbles(codes.reshape(*codes.shape[:2], 4, 16))
    blocks[..., 4:] = packed.reshape(*codes.shape[:2], 32)


def _float8(scale: Floats) -> Bytes:
    # Codes stand for doubled numbers, so the scale is twice what they are multiplied by.
    return nearest_e4m3(np.ascontiguousarray(2 * scale, np.float32))


GRID = scaled_grid(
    BLOCK,
    BLOCK_BYTES,
    E2M1.tolist(),
    _put,
    group=16,
    field=slice(0, 4),
    to_bytes=_float8,
    of_bytes=half_scales,
    allowed=lambda scale: half_scales(_float8(np.abs(scale))),
)


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    return interleave(byte_blocks(raw, BLOCK_BYTES), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    half = splat_f32(128.0)  # of 256: with the activations' scale, which is one for all rows
    for c in range(2):
        entry = load_q8(x + c * (48 * group), tokens)
        codes = w + (64 + 256 * c)
        scales = w + 32 * c
        xs = q8_f32(entry, 32) * half
        first = dot_start(entry, 44, SMALL)
        low = dot_init(first, tiles)
        high = dot_init(dot_start(entry, 40, SMALL) - first, tiles)
        v = load_eights(codes, tiles, stride)
        low = dot8(low, lookup16(v, 0, E2M1_LOW, E2M1_HIGH, SMALL), entry, 0, SMALL)
        low = dot8(low, lookup16(v, 4, E2M1_LOW, E2M1_HIGH, SMALL), entry, 8, SMALL)
        scale = load_e4m3(scales, tiles, stride)
        acc = fma(outer(scale, xs), to_f32(dot_result(low, SMALL)), acc)
        v = load_eights(codes + 128, tiles, stride)
        high = dot8(high, lookup16(v, 0, E2M1_LOW, E2M1_HIGH, SMALL), entry, 16, SMALL)
        high = dot8(high, lookup16(v, 4, E2M1_LOW, E2M1_HIGH, SMALL), entry, 24, SMALL)
        scale = load_e4m3(scales + 16, tiles, stride)
        acc = fma(outer(scale, xs), to_f32(dot_result(high, SMALL)), acc)
    return acc


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    for row in range(16):
        four = get_u32(src + row * row_bytes)
        for s in range(4):
            put_u8(dst + (16 * s + row), four >> (8 * s))
    interleave_words(src + 4, row_bytes, dst + 64, 8)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 64 weights of row `lane` of a tile block."""
    for s in range(4):
        scale = get_e4m3(w + (16 * s + lane)) * f32(128)
        for i in range(8):
            both = get_u8(w + (64 + 128 * s + i // 4 * 64 + lane * 4 + i % 4))
            to = out + (16 * s + i) * 4
            put_f32(to, scale * f32(table_value(E2M1_LOW, E2M1_HIGH, both & 15)))
            put_f32(to + 32, scale * f32(table_value(E2M1_LOW, E2M1_HIGH, both >> 4)))


FORMAT = Format(
    name="nvfp4",
    ggml_type="NVFP4",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=576,
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
