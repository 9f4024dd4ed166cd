"""IQ4_XS: 256 weights in 8 sub-blocks of 32, each with a scale of 6 bits. 4.25 bits.

A weight of sub-block s is `d * (scale[s] - 32)` times one of 16 values, those of IQ4_NL.
Source: `block_iq4_xs` of ggml-common.h; `quantize_row_iq4_xs_ref` and `quantize_row_iq4_nl_impl`
of ggml-quants.c.

Row block, 136 bytes (raw), sub-blocks s = 0..7:
    bytes          what
    0..1           d, float16
    2..3           scales_h, little-endian 16 bits: bits 2s..2s+1 = bits 4..5 of scale[s]
    4..7           scales_l: byte s / 2 = bits 0..3 of scale[s] (s even: low nibble, odd: high)
    8 + 16s + b    qs: code of input 32s + b (low nibble) | of input 32s + 16 + b (high nibble)

Tile block, 2208 bytes (16 rows r, 4 groups j of 4 bytes i):
    bytes                        what
    2r .. 2r+1                   d of row r
    32 + 16s + r                 scale[s] of row r
    160 + 256s + 64j + 4r + i    qs byte 16s + 4j + i of row r: input 32s + 4j + i low,
                                 input 32s + 16 + 4j + i high

It takes 138 instead of 136 bytes a row, because the scales are unpacked to bytes.
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
    half_bytes,
    halves,
    interleave,
    pack_nibbles,
    unpack_nibbles,
)
from headrace.sparse.interleaving import interleave_halves, interleave_words, load_eights
from headrace.sparse.k_quants import BLOCK, encode_blocks
from headrace.sparse.lookup import (
    IQ4,
    IQ4_HIGH,
    IQ4_LOW,
    nearest_iq4,
    search_iq4,
    table_value,
)
from headrace.targets.simd import (
    dot16,
    dot_init,
    dot_result,
    dot_start,
    f32,
    fma,
    get_f16,
    get_u8,
    get_u16,
    load_f16,
    load_q8,
    load_u8_i32,
    lookup16,
    outer,
    put_f32,
    put_u8,
    q8_f32,
    splat_i32,
    to_f32,
)

BLOCK_BYTES = 136
RUNS = ((2, 2), (8, 1), (128, 4))
_HIGH = np.arange(0, 16, 2, dtype=np.uint16)


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise by ggml's reference search over 16 scales per sub-block, without importances."""
    return encode_blocks(x, BLOCK_BYTES, _encode_blocks)


def _encode_blocks(blocks: Floats) -> Bytes:
    # [n, 256] -> [n, 136]
    found, _ = search_iq4(blocks.reshape(-1, 32), tries=7)
    scales = found.reshape(-1, 8)
    at = np.abs(scales).argmax(axis=-1, keepdims=True)
    d = np.take_along_axis(scales, at, axis=-1) / -32
    steps = np.rint(np.where(d == 0, np.float32(0), 1 / d) * scales).clip(-32, 31)
    step = (d * steps)[..., None]
    inverse = np.where(step == 0, np.float32(0), 1 / step)
    codes = nearest_iq4(inverse * blocks.reshape(-1, 8, 32))
    return _join(half_bytes(d), (steps + 32).astype(np.uint8), pack_nibbles(codes))


def _join(d: Bytes, scales: Bytes, packed: Bytes) -> Bytes:
    # Row blocks [n, 136] of the bytes of d [n, 2], scales [n, 8], and qs [n, 8, 16].
    high = np.bitwise_or.reduce(scales.astype(np.uint16) >> 4 << _HIGH, axis=-1, keepdims=True)
    low = (scales[:, 0::2] & 0x0F) | (scales[:, 1::2] << 4)
    return np.concatenate([d, high.view(np.uint8), low, packed.reshape(-1, 128)], axis=-1)


def _scales(blocks: Bytes) -> Bytes:
    # scale[s] as 0..63: [..., 136] -> [..., 8].
    low = np.stack([blocks[..., 4:8] & 0x0F, blocks[..., 4:8] >> 4], axis=-1)
    high = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16) >> _HIGH & 3
    scales: Bytes = low.reshape(high.shape) | (high << 4).astype(np.uint8)
    return scales


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    step = halves(blocks[..., :2]) * (_scales(blocks).astype(np.float32) - 32)
    values = IQ4[unpack_nibbles(blocks[..., 8:].reshape(*shape, 8, 16))].astype(np.float32)
    return as_rows((step[..., None] * values).reshape(*shape, BLOCK))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows, the scales in bytes: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    ordered = np.concatenate([blocks[..., :2], _scales(blocks), blocks[..., 8:]], axis=-1)
    return interleave(ordered, RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    flat = blocks.reshape(-1, blocks.shape[-1])
    raw = _join(flat[:, :2], flat[:, 2:10], flat[:, 10:])
    return as_rows(raw.reshape(*blocks.shape[:2], BLOCK_BYTES))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    for s in range(8):
        entry = load_q8(x + s * (48 * group), tokens)
        codes = w + (160 + 256 * s)
        total = dot_init(dot_start(entry, 40, 8), tiles)
        v = load_eights(codes, tiles, stride)
        low = lookup16(v, 0, IQ4_LOW, IQ4_HIGH, 8)
        high = lookup16(v, 4, IQ4_LOW, IQ4_HIGH, 8)
        total = dot16(total, low, high, entry, 0, 8)
        v = load_eights(codes + 128, tiles, stride)
        low = lookup16(v, 0, IQ4_LOW, IQ4_HIGH, 8)
        high = lookup16(v, 4, IQ4_LOW, IQ4_HIGH, 8)
        total = dot16(total, low, high, entry, 8, 8)
        scale = d * to_f32(load_u8_i32(w + (32 + 16 * s), tiles, stride) - splat_i32(32))
        acc = fma(outer(scale, q8_f32(entry, 32)), to_f32(dot_result(total, 8)), acc)
    return acc


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)
    for row in range(16):
        at = src + row * row_bytes
        high = get_u16(at + 2)
        for s in range(8):
            low = get_u8(at + (4 + s // 2)) >> (4 * (s % 2))
            put_u8(dst + (32 + 16 * s + row), (low & 15) | ((high >> (2 * s)) & 3) << 4)
    interleave_words(src + 8, row_bytes, dst + 160, 32)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for s in range(8):
        step = d * f32(get_u8(w + (32 + 16 * s + lane)) - 32)
        for i in range(16):
            both = get_u8(w + (160 + 256 * s + i // 4 * 64 + lane * 4 + i % 4))
            to = out + (32 * s + i) * 4
            put_f32(to, step * f32(table_value(IQ4_LOW, IQ4_HIGH, both & 15)))
            put_f32(to + 64, step * f32(table_value(IQ4_LOW, IQ4_HIGH, both >> 4)))


FORMAT = Format(
    name="iq4_xs",
    ggml_type="IQ4_XS",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=2208,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
)
