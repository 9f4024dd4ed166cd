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
    half_bytes,
    halves,
    interleave,
    pack_nibbles,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_words, load_eights
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
    load_runs,
    load_u8_i32,
    outer,
    part,
    put_f32,
    q8_f32,
    repeat,
    shr_u8,
    splat_f32,
    splat_i32,
    store_u8,
    store_u8_quarters,
    to_f32,
)

BLOCK = 256
BLOCK_BYTES = 144
RUNS = ((2, 2), (2, 2), (16, 1), (128, 4))
CHUNK = 2048  # blocks that `encode` searches at once: some 20 MB of temporaries


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise by ggml's reference search over 21 steps per sub-block, without importances."""
    blocks = weight_blocks(x, BLOCK)
    flat = blocks.reshape(-1, BLOCK)
    raw = np.empty((len(flat), BLOCK_BYTES), np.uint8)
    for at in range(0, len(flat), CHUNK):
        raw[at : at + CHUNK] = _encode_blocks(flat[at : at + CHUNK])
    return as_rows(raw.reshape(*blocks.shape[:2], BLOCK_BYTES))


def _encode_blocks(blocks: Floats) -> Bytes:
    # [n, 256] -> [n, 144]
    x = np.ascontiguousarray(blocks.reshape(-1, 32).T)  # (32, sub-blocks): sums run in C's order
    scale, low, codes = _search(x)
    scale, low = scale.reshape(-1, 8), low.reshape(-1, 8)
    d, scale_codes = _six_bits(scale)
    dmin, low_codes = _six_bits(low)
    step = (halves(d) * scale_codes).ravel()
    offset = (halves(dmin) * low_codes).ravel()
    again = np.rint((x + offset) / step).clip(0, 15)
    codes = np.where(step == 0, codes, again).astype(np.uint8)
    packed = pack_nibbles(np.ascontiguousarray(codes.T).reshape(-1, 4, 64)).reshape(-1, 128)
    return np.concatenate([d, dmin, _pack_scales(scale_codes, low_codes), packed], axis=-1)


def _six_bits(values: Floats) -> tuple[Bytes, Bytes]:
    # [n, 8] floats -> float16 bytes [n, 2] of their unit, codes 0..63 [n, 8]
    most = values.max(axis=-1, keepdims=True).clip(0, None)
    inverse = np.where(most > 0, np.float32(63) / most, np.float32(0))
    # A negative scale wraps around to 63, as it does in C.
    codes = np.rint(inverse * values).astype(np.int32).astype(np.uint8)
    return half_bytes(most / np.float32(63)), np.minimum(codes, 63)


def _search(x: Floats) -> tuple[Floats, Floats, Floats]:
    # [32, n] -> scale [n], minus the minimum [n], codes [32, n]: ggml's make_qkx2_quants.
    weight = np.sqrt((x * x).sum(axis=0) / np.float32(32)) + np.abs(x)
    sum_w, sum_x = weight.sum(axis=0), (weight * x).sum(axis=0)
    high = x.max(axis=0)
    low = np.minimum(x.min(axis=0), np.float32(0))
    flat = high == low
    scale = 1 / (15 / (high - low))
    codes = np.rint(15 / (high - low) * (x - low)).clip(0, 15)
    error = (weight * (scale * codes + low - x) ** 2).sum(axis=0)
    for step in range(21):
        levels = np.float32(-1) + np.float32(0.1) * np.float32(step) + np.float32(15)
        # `low` is the best so far, not the block's own: each step starts from the last success.
        tried = np.rint(levels / (high - low) * (x - low)).clip(0, 15)
        weighted = weight * tried
        sum_l = weighted.sum(axis=0)
        sum_l2, sum_xl = (weighted * tried).sum(axis=0), (weighted * x).sum(axis=0)
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        new_scale = np.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = np.minimum(new_low, np.float32(0))
        new_error = (weight * (new_scale * tried + new_low - x) ** 2).sum(axis=0)
        better = (det > 0) & (new_error < error)
        codes = np.where(better, tried, codes)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
        error = np.where(better, new_error, error)
    # A sub-block of one value <= 0 is all minimum.
    return np.where(flat, 0, scale), -low, np.where(flat, 0, codes)


def _pack_scales(scale: Bytes, low: Bytes) -> Bytes:
    # [..., 8] and [..., 8], 0..63 -> [..., 12]
    first = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    second = low[..., :4] | (low[..., 4:] >> 4 << 6)
    third = (scale[..., 4:] & 0x0F) | (low[..., 4:] << 4)
    return np.concatenate([first, second, third], axis=-1)


def _unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    # [..., 12] -> [..., 8] and [..., 8], 0..63
    first, second, third = np.split(packed, 3, axis=-1)
    scale = np.concatenate([first & 63, (third & 0x0F) | (first >> 6 << 4)], axis=-1)
    low = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scale, low


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    scale, low = _unpack_scales(blocks[..., 4:16])
    scales = (halves(blocks[..., 0:2]) * scale)[..., None]  # (rows, n_blocks, 8, 1)
    lows = (halves(blocks[..., 2:4]) * low)[..., None]
    packed = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    codes = unpack_nibbles(packed).reshape(*blocks.shape[:2], 8, 32).astype(np.float32)
    return as_rows((scales * codes - lows).reshape(*blocks.shape[:2], BLOCK))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows and give every 6-bit scale and minimum its byte: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    scales = np.stack(_unpack_scales(blocks[..., 4:16]), axis=-1)  # (rows, n_blocks, 8, 2)
    bytewise = scales.reshape(*blocks.shape[:2], 16)
    return interleave(np.concatenate([blocks[..., :4], bytewise, blocks[..., 16:]], axis=-1), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    packed = _pack_scales(blocks[..., 4:20:2], blocks[..., 5:20:2])
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
    store_u8(dst, part(load_runs(src, row_bytes, 2), 0))  # d and dmin
    by_byte = load_runs(src, row_bytes, 1)
    first, second, third = part(by_byte, 1), part(by_byte, 2), part(by_byte, 3)
    store_u8_quarters(dst + 64, and_u8(first, 63), 32)
    store_u8_quarters(dst + 80, and_u8(second, 63), 32)
    store_u8_quarters(dst + 192, and_u8(third, 15) | and_u8(shr_u8(first, 2), 48), 32)
    store_u8_quarters(dst + 208, shr_u8(third, 4) | and_u8(shr_u8(second, 2), 48), 32)
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
)
