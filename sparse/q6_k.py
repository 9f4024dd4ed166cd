"""Q6_K: 256 weights in 16 sub-blocks of 16, each with an int8 scale. 6.5625 bits.

A weight of sub-block s is `(d * scale[s]) * (code - 32)`, code 0..63.
Source: `block_q6_K` of ggml-common.h; `quantize_row_q6_K_ref`, `make_qx_quants` of ggml-quants.c.

Row block, 210 bytes (raw), halves h = 0..1 of 128 inputs, b = 0..31:
    bytes             what
    64h + b           ql: bits 0..3 of input 128h + b (low nibble), of 128h + 64 + b (high nibble)
    64h + 32 + b      ql: the same of input 128h + 32 + b and of 128h + 96 + b
    128 + 32h + b     qh: bits 2k..2k+1 = bits 4..5 of input 128h + 32k + b, k = 0..3
    192 + s           scale[s], int8
    208..209          d, float16

Tile block, 3360 bytes (16 rows r, chunks c = 0..7 of 32 inputs, i = 0..3):
    bytes                          what
    2r .. 2r+1                     d of row r
    32 + 16s + r                   scale[s] of row r, int8
    288 + 256c + 64j + 4r + i      bits 0..3 of input 32c + 4j + i (low nibble) and of input
                                   32c + 16 + 4j + i (high nibble) of row r, j = 0..3
    2336 + 128c + 64v + 4r + i     bits 2k..2k+1 = bits 4..5 of input 32c + 16v + 4k + i of row r,
                                   k = 0..3, v = 0..1

So the low nibbles of group j go with bits 2j..2j+1 of vector v = 0, the high nibbles with those of
vector v = 1, lane by lane.
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
from headrace.sparse.interleaving import (
    interleave_halves,
    load_eights,
    regroup_nibbles,
    transpose_pairs,
)
from headrace.sparse.k_quants import BLOCK, encode_blocks, sub_blocks
from headrace.targets.simd import (
    and_u8,
    copy_runs,
    dot8,
    dot_init,
    dot_result,
    eights,
    f32,
    fma,
    get_f16,
    get_i8,
    get_u8,
    load_f16,
    load_i8_i32,
    load_q8,
    load_runs,
    load_u8,
    outer,
    part,
    put_f32,
    q8_f32,
    q8_i32,
    shl,
    shl_u8,
    shr_u8,
    to_f32,
)

BLOCK_BYTES = 210
RUNS = ((2, 2), (16, 1), (128, 4), (64, 4))
_EPSILON = np.float32(1e-15)  # a group below it counts as zero, as in ggml
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise by ggml's reference search over 19 scales per sub-block, without importances."""
    return encode_blocks(x, BLOCK_BYTES, _encode_blocks)


def _encode_blocks(blocks: Floats) -> Bytes:
    # [n, 256] -> [n, 210]
    x = sub_blocks(blocks, 16)
    scale, codes = _search(x)
    scale = scale.reshape(-1, 16)
    at = np.abs(scale).argmax(axis=-1, keepdims=True)
    most = np.take_along_axis(scale, at, axis=-1)
    zero = np.abs(most) < _EPSILON  # (n, 1)
    inverse = np.where(zero, np.float32(0), np.float32(-128) / most)
    d = half_bytes(np.where(zero, np.float32(0), 1 / inverse))
    scale_codes = np.minimum(np.rint(inverse * scale), 127).astype(np.int8)
    step = (halves(d) * scale_codes).ravel()
    again = np.rint(x / step).clip(-32, 31) + 32
    codes = np.where(step == 0, codes, again).astype(np.uint8)
    by_block = np.ascontiguousarray(codes.T).reshape(-1, BLOCK)
    return np.where(zero, np.uint8(0), join(d, scale_codes, by_block))


def _search(x: Floats) -> tuple[Floats, Floats]:
    # [16, n] -> scale [n], codes 0..63 [16, n]: ggml's make_qx_quants, weights x * x.
    at = np.abs(x).argmax(axis=0, keepdims=True)
    most = np.take_along_axis(x, at, axis=0)[0]
    zero = np.abs(most) < _EPSILON
    weight = x * x
    codes, scale, best = np.zeros_like(x), np.zeros_like(most), np.zeros_like(most)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(32) + np.float32(0.1) * np.float32(step)) / most
        tried = np.rint(inverse * x).clip(-32, 31)
        sum_lx, sum_l2 = (weight * x * tried).sum(axis=0), (weight * tried * tried).sum(axis=0)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2) if step else sum_l2 > 0
        codes = np.where(better if step else True, tried + 32, codes)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
    return np.where(zero, 0, scale), np.where(zero, 0, codes)


def join(d: Bytes, scales: Bytes, codes: Bytes) -> Bytes:
    """Build row blocks from the bytes of d [n, 2], int8 scales [n, 16] and codes [n, 256]."""
    quarters = codes.reshape(-1, 2, 4, 32)  # (n, h, k, b)
    low = pack_nibbles((quarters & 0x0F).reshape(-1, 2, 128)).reshape(-1, 128)
    high = np.bitwise_or.reduce(quarters >> 4 << _SHIFTS[:, None], axis=2).reshape(-1, 64)
    return np.concatenate([low, high, scales.view(np.uint8), d], axis=-1)


def _codes(blocks: Bytes) -> Bytes:
    # Codes 0..63 in the order of the inputs: [rows, n_blocks, 210] -> [rows, n_blocks, 256].
    shape = blocks.shape[:2]
    low = unpack_nibbles(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> _SHIFTS[:, None] & 3
    codes: Bytes = low | (high << 4)
    return codes.reshape(*shape, BLOCK)


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    scales = halves(blocks[..., 208:]) * blocks[..., 192:208].view(np.int8)  # (.., 16)
    codes = _codes(blocks).astype(np.float32).reshape(*shape, 16, 16) - 32
    return as_rows((scales[..., None] * codes).reshape(*shape, BLOCK))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows, the codes in the order of the inputs: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    codes = _codes(blocks)
    low = pack_nibbles((codes & 0x0F).reshape(*shape, 8, 32)).reshape(*shape, 128)
    quads = codes.reshape(*shape, 16, 4, 4) >> 4 << _SHIFTS[:, None]  # (.., c and v, k, i)
    high = np.bitwise_or.reduce(quads, axis=-2).reshape(*shape, 64)
    ordered = np.concatenate([blocks[..., 208:], blocks[..., 192:208], low, high], axis=-1)
    return interleave(ordered, RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    shape = blocks.shape[:2]
    low = unpack_nibbles(blocks[..., 18:146].reshape(*shape, 8, 16)).reshape(-1, BLOCK)
    high = blocks[..., 146:].reshape(*shape, 16, 1, 4) >> _SHIFTS[:, None] & 3
    codes = low | (high.reshape(-1, BLOCK) << 4)
    flat = blocks.reshape(-1, BLOCK_BYTES)
    return as_rows(join(flat[:, :2], flat[:, 2:18], codes).reshape(*shape, BLOCK_BYTES))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    for c in range(8):
        entry = load_q8(x + c * (48 * group), tokens)
        codes = w + (288 + 256 * c)
        bits = w + (2336 + 128 * c)
        first = q8_i32(entry, 44)
        low = dot_init(shl(first, 5), tiles)
        high = dot_init(shl(q8_i32(entry, 40) - first, 5), tiles)
        h0 = load_u8(bits, tiles, stride)
        h1 = load_u8(bits + 64, tiles, stride)
        v = load_eights(codes, tiles, stride)
        lower = and_u8(v, 15) | and_u8(eights(shl_u8(h0, 4), shl_u8(h0, 2)), 48)
        upper = shr_u8(v, 4) | and_u8(eights(shl_u8(h1, 4), shl_u8(h1, 2)), 48)
        low = dot8(low, lower, entry, 0, 6)
        high = dot8(high, upper, entry, 16, 6)
        v = load_eights(codes + 128, tiles, stride)
        lower = and_u8(v, 15) | and_u8(eights(h0, shr_u8(h0, 2)), 48)
        upper = shr_u8(v, 4) | and_u8(eights(h1, shr_u8(h1, 2)), 48)
        low = dot8(low, lower, entry, 8, 6)
        high = dot8(high, upper, entry, 24, 6)
        xs = q8_f32(entry, 32)
        scale = d * to_f32(load_i8_i32(w + (32 + 32 * c), tiles, stride))
        acc = fma(outer(scale, xs), to_f32(dot_result(low, 6)), acc)
        scale = d * to_f32(load_i8_i32(w + (48 + 32 * c), tiles, stride))
        acc = fma(outer(scale, xs), to_f32(dot_result(high, 6)), acc)
    return acc


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    for h in range(2):
        for k in range(2):  # and the chunk 64 inputs behind, whose bits are the high nibbles
            to = dst + (288 + 1024 * h + 256 * k)
            regroup_nibbles(src + (64 * h + 32 * k), row_bytes, to, to + 512)
        for v in range(2):
            high = load_runs(src + (128 + 32 * h + 16 * v), row_bytes, 4)
            a, b, c, d = part(high, 0), part(high, 1), part(high, 2), part(high, 3)
            transpose_pairs(a, b, c, d, dst + (2336 + 512 * h + 64 * v), 128)
    # Last, as in the rows: reads from memory are fetched ahead where addresses rise.
    copy_runs(dst + 32, src + 192, row_bytes, 1)
    interleave_halves(src + 208, row_bytes, dst)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for i in range(256):
        c = i // 32
        upper = i % 32 // 16
        j = i % 16 // 4
        at = lane * 4 + i % 4
        low = (get_u8(w + (288 + 256 * c + 64 * j + at)) >> (4 * upper)) & 15
        high = (get_u8(w + (2336 + 128 * c + 64 * upper + at)) >> (2 * j)) & 3
        scale = d * f32(get_i8(w + (32 + i // 16 * 16 + lane)))
        put_f32(out + i * 4, scale * f32((low | (high << 4)) - 32))


FORMAT = Format(
    name="q6_k",
    ggml_type="Q6_K",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=3360,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
)
