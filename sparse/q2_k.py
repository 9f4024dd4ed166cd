"""Q2_K: 256 weights in 16 sub-blocks of 16, each with a 4-bit scale and minimum. 2.625 bits.

A weight of sub-block s is `(d * scale[s]) * code - dmin * min[s]`, code 0..3.
Source: `block_q2_K` of ggml-common.h; `quantize_row_q2_K_ref` of ggml-quants.c.

Row block, 84 bytes (raw), halves h = 0..1 of 128 inputs, b = 0..31:
    bytes         what
    s             scale[s] (low nibble) | min[s] (high nibble), s = 0..15
    16 + 32h + b  qs: bits 2k..2k+1 = code of input 128h + 32k + b, k = 0..3
    80..81        d, float16
    82..83        dmin, float16

Tile block, 1344 bytes (16 rows r, chunks c = 0..7 of 32 inputs, i = 0..3):
    bytes                          what
    2r .. 2r+1                     d of row r
    32 + 2r .. 32 + 2r+1           dmin of row r
    64 + 16s + r                   scale[s] | min[s] of row r, as above
    320 + 128c + 64v + 4r + i      bits 2k..2k+1 = code of input 32c + 8k + 4v + i of row r,
                                   k = 0..3, v = 0..1
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
)
from headrace.sparse.interleaving import load_eights, transpose_pairs
from headrace.sparse.k_quants import BLOCK, encode_blocks, search_with_minimum, sub_blocks
from headrace.targets.simd import (
    and_u8,
    copy_runs,
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
    q8_i32,
    repeat,
    shr,
    shr_u8,
    splat_f32,
    splat_i32,
    store_u8,
    to_f32,
)

BLOCK_BYTES = 84
RUNS = ((2, 2), (2, 2), (16, 1), (64, 4))
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise by ggml's reference search over 16 steps per sub-block, without importances."""
    return encode_blocks(x, BLOCK_BYTES, _encode_blocks)


def _encode_blocks(blocks: Floats) -> Bytes:
    # [n, 256] -> [n, 84]
    x = sub_blocks(blocks, 16)
    scale, low, codes = search_with_minimum(x, np.abs(x), 3, -0.5, 16, absolute=True)
    d, scale_codes = _four_bits(scale.reshape(-1, 16))
    dmin, low_codes = _four_bits(low.reshape(-1, 16))
    # A negative scale reaches into the nibble of the minimum, as it does in C.
    scales = scale_codes | low_codes << 4
    step = (halves(d) * (scales & 15)).ravel()
    offset = (halves(dmin) * (scales >> 4)).ravel()
    again = np.rint((x + offset) / step).clip(0, 3)
    codes = np.where(step == 0, codes, again).astype(np.uint8)
    quarters = np.ascontiguousarray(codes.T).reshape(-1, 2, 4, 32)  # (n, h, k, b)
    return np.concatenate([scales, _pack(quarters).reshape(-1, 64), d, dmin], axis=-1)


def _four_bits(values: Floats) -> tuple[Bytes, Bytes]:
    # [n, 16] floats -> float16 bytes [n, 2] of their unit, codes 0..15 [n, 16]
    most = values.max(axis=-1, keepdims=True).clip(0, None)
    inverse = np.where(most > 0, np.float32(15) / most, np.float32(0))
    return half_bytes(most / np.float32(15)), np.rint(inverse * values).astype(np.int32).astype(
        "u1"
    )


def _pack(codes: Bytes) -> Bytes:
    # Codes 0..3 [..., 4, k] -> [..., k].
    packed: Bytes = np.bitwise_or.reduce(codes << _SHIFTS[:, None], axis=-2)
    return packed


def _unpack(packed: Bytes) -> Bytes:
    # Undoes `_pack`.
    codes: Bytes = packed[..., None, :] >> _SHIFTS[:, None] & 3
    return codes


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    scales = (halves(blocks[..., 80:82]) * (blocks[..., :16] & 15))[..., None]
    lows = (halves(blocks[..., 82:84]) * (blocks[..., :16] >> 4))[..., None]
    codes = _unpack(blocks[..., 16:80].reshape(*shape, 2, 32)).astype(np.float32)
    return as_rows((scales * codes.reshape(*shape, 16, 16) - lows).reshape(*shape, BLOCK))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows, the codes of 32 inputs in 8 bytes: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    codes = _unpack(blocks[..., 16:80].reshape(*shape, 2, 32))
    packed = _pack(codes.reshape(*shape, 8, 4, 8)).reshape(*shape, 64)
    ordered = [blocks[..., 80:], blocks[..., :16], packed]
    return interleave(np.concatenate(ordered, axis=-1), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    shape = blocks.shape[:2]
    codes = _unpack(blocks[..., 20:].reshape(*shape, 8, 8))
    packed = _pack(codes.reshape(*shape, 2, 4, 32)).reshape(*shape, 64)
    return as_rows(np.concatenate([blocks[..., 4:20], packed, blocks[..., :4]], axis=-1))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    dmin = load_f16(w + 32, tiles, stride)
    less = splat_f32(0.0) - dmin
    ones = repeat(splat_f32(1.0), tokens)
    none = repeat(splat_i32(0), tokens)
    for c in range(8):
        entry = load_q8(x + c * (48 * group), tokens)
        v = load_eights(w + (320 + 128 * c), tiles, stride)
        low = dot8(dot_init(none, tiles), and_u8(v, 3), entry, 0, 4)
        low = dot8(low, and_u8(shr_u8(v, 2), 3), entry, 8, 4)
        high = dot8(dot_init(none, tiles), and_u8(shr_u8(v, 4), 3), entry, 16, 4)
        high = dot8(high, shr_u8(v, 6), entry, 24, 4)
        one = load_u8_i32(w + (64 + 32 * c), tiles, stride)
        two = load_u8_i32(w + (80 + 32 * c), tiles, stride)
        nibble = splat_i32(15)
        # The sub-blocks' sums are put together before d: an outer product less for each row.
        total = outer(to_f32(one & nibble), ones) * to_f32(dot_result(low, 4))
        total = fma(outer(to_f32(two & nibble), ones), to_f32(dot_result(high, 4)), total)
        xs = q8_f32(entry, 32)
        acc = fma(outer(d, xs), total, acc)
        # min[0] * first + min[1] * (whole - first), where -first and scale * whole are given
        apart = to_f32(shr(one, 4) - shr(two, 4))
        acc = fma_outer(dmin * apart, xs * to_f32(q8_i32(entry, 44)), acc)
        acc = fma_outer(less * to_f32(shr(two, 4)), q8_f32(entry, 36), acc)
    return acc


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    copy_runs(dst + 64, src, row_bytes, 1)
    for h in range(2):
        low = load_runs(src + (16 + 32 * h), row_bytes, 4)
        high = load_runs(src + (32 + 32 * h), row_bytes, 4)
        to = dst + (320 + 512 * h)
        # Bits 2k..2k+1 of groups v, v + 2, v + 4 and v + 6 become those of one byte of chunk k.
        transpose_pairs(part(low, 0), part(low, 2), part(high, 0), part(high, 2), to, 128)
        transpose_pairs(part(low, 1), part(low, 3), part(high, 1), part(high, 3), to + 64, 128)
    store_u8(dst, part(load_runs(src + 68, row_bytes, 2), 3))  # d and dmin


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    dmin = get_f16(w + (32 + lane * 2))
    for s in range(16):
        both = get_u8(w + (64 + 16 * s + lane))
        scale = d * f32(both & 15)
        low = dmin * f32(both >> 4)
        codes = w + (320 + 128 * (s // 2) + lane * 4)
        for i in range(16):
            byte = get_u8(codes + (64 * (i // 4 % 2) + i % 4))
            code = (byte >> (4 * (s % 2) + i // 8 * 2)) & 3
            put_f32(out + (16 * s + i) * 4, scale * f32(code) - low)


FORMAT = Format(
    name="q2_k",
    ggml_type="Q2_K",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=1344,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
)
