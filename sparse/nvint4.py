"""NVINT4: NVFP4's bytes with integers for codes: 4 sub-blocks of 16 make 64 weights. 4.5 bits.

A weight is its sub-block's scale times `code - 8`. A scale is E4M3 without a sign, divided by 256:
it reaches from 2^-17 to 1.75, where the scales of models' weights are, so that no tensor needs a
scale of its own; magnitudes beyond 12.25 are cut. Source: "INT v.s. FP" (arXiv 2510.25602). GGML
has no such type: only files of our own hold it.

Row block, 36 bytes, and tile block, 576 bytes: as in `headrace.sparse.nvfp4`.
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
    pack_nibbles,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import load_eights
from headrace.sparse.nvfp4 import half_scales, nearest_e4m3, tile, tile_block, untile
from headrace.targets.simd import (
    and_u8,
    dot8,
    dot_init,
    dot_result,
    f32,
    fma,
    get_e4m3,
    get_u8,
    load_e4m3,
    load_q8,
    outer,
    put_f32,
    q8_f32,
    q8_shifted,
    shr_u8,
    to_f32,
)

BLOCK = 64
BLOCK_BYTES = 36


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the largest magnitude of a sub-block at 7 steps, ties to even."""
    blocks = weight_blocks(x, BLOCK)
    subs = blocks.reshape(*blocks.shape[:2], 4, 16)
    scales = nearest_e4m3(np.abs(subs).max(axis=-1) * np.float32(256 / 7))
    d = half_scales(scales)[..., None] / 128
    steps = np.rint(subs / np.where(d == 0, np.float32(1), d)).clip(-7, 7)
    packed = pack_nibbles((np.where(d == 0, 0, steps) + 8).astype(np.uint8))
    return as_rows(np.concatenate([scales, packed.reshape(*blocks.shape[:2], 32)], axis=-1))


def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    codes = unpack_nibbles(blocks[..., 4:].reshape(*shape, 4, 8)).astype(np.int8) - np.int8(8)
    d = half_scales(blocks[..., :4])[..., None] / 128
    return as_rows((d * codes.astype(np.float32)).reshape(*shape, BLOCK))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    for c in range(2):
        entry = load_q8(x + c * (48 * group), tokens)
        codes = w + (64 + 256 * c)
        scales = w + 32 * c
        xs = q8_f32(entry, 32)
        first = q8_shifted(entry, 44, 3)
        low = dot_init(first, tiles)
        high = dot_init(q8_shifted(entry, 40, 3) - first, tiles)
        v = load_eights(codes, tiles, stride)
        low = dot8(low, and_u8(v, 15), entry, 0, 4)
        low = dot8(low, shr_u8(v, 4), entry, 8, 4)
        acc = fma(outer(load_e4m3(scales, tiles, stride), xs), to_f32(dot_result(low, 4)), acc)
        v = load_eights(codes + 128, tiles, stride)
        high = dot8(high, and_u8(v, 15), entry, 16, 4)
        high = dot8(high, shr_u8(v, 4), entry, 24, 4)
        scale = load_e4m3(scales + 16, tiles, stride)
        acc = fma(outer(scale, xs), to_f32(dot_result(high, 4)), acc)
    return acc


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 64 weights of row `lane` of a tile block."""
    for s in range(4):
        scale = get_e4m3(w + (16 * s + lane))
        for i in range(8):
            both = get_u8(w + (64 + 128 * s + i // 4 * 64 + lane * 4 + i % 4))
            to = out + (16 * s + i) * 4
            put_f32(to, scale * f32((both & 15) - 8))
            put_f32(to + 32, scale * f32((both >> 4) - 8))


FORMAT = Format(
    name="nvint4",
    modules=("nvint4", "nvfp4"),
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
)
