"""Q3_K: 256 weights in 16 sub-blocks of 16, each with a 6-bit scale. 3.4375 bits.

A weight of sub-block s is `(d * (scale[s] - 32)) * (code - 4)`, code 0..7.
Source: `block_q3_K` of ggml-common.h; `quantize_row_q3_K_ref`, `make_q3_quants` of ggml-quants.c.

Row block, 110 bytes (raw), halves h = 0..1 of 128 inputs, b = 0..31:
    bytes         what
    b             hmask: bit 4h + k = bit 2 of the code of input 128h + 32k + b, k = 0..3
    32 + 32h + b  qs: bits 2k..2k+1 = bits 0..1 of input 128h + 32k + b, k = 0..3
    96 + b        bits 0..3 of scale[b] (low nibble) and of scale[8 + b] (high nibble), b = 0..7
    104 + b       bits 2k..2k+1 = bits 4..5 of scale[4k + b], b = 0..3
    108..109      d, float16

Tile block, 1824 bytes (16 rows r, chunks c = 0..7 of 32 inputs, i = 0..3):
    bytes                    what
    2r .. 2r+1               d of row r
    32 + 16s + r             scale[s] - 32 of row r, int8
    288 + 192c + 4r + i      bits 0..2: code of input 32c + i; 3..5: of input 32c + 8 + i;
                             6..7: bits 0..1 of input 32c + 24 + i
    352 + 192c + 4r + i      the same of inputs 4 behind these
    416 + 192c + 4r + i      bits 0..2: code of input 32c + 16 + i; 3..5: of input 32c + 20 + i;
                             6: bit 2 of input 32c + 24 + i; 7: bit 2 of input 32c + 28 + i

So six of eight groups of codes need a shift and a mask, and only two are put together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.format import (
    TILE_ROWS,
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
from headrace.sparse.interleaving import interleave_halves, load_eights
from headrace.sparse.k_quants import BLOCK, encode_blocks, sub_blocks
from headrace.targets.simd import (
    and_u8,
    bits_i32,
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
    repeat,
    shl,
    shl_u8,
    shr_u8,
    splat_f32,
    splat_i32,
    store_i32,
    store_u8,
    to_f32,
)

BLOCK_BYTES = 110
RUNS = ((2, 2), (16, 1), (96, 4))
_EPSILON = np.float32(1e-15)  # a group below it counts as zero, as in ggml
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise by ggml's reference search: codes one by one, up to 5 times."""
    return encode_blocks(x, BLOCK_BYTES, _encode_blocks)


def _encode_blocks(blocks: Floats) -> Bytes:
    # [n, 256] -> [n, 110]
    x = sub_blocks(blocks, 16)
    scale, codes = _search(x)
    scale = scale.reshape(-1, 16)
    at = np.abs(scale).argmax(axis=-1, keepdims=True)
    most = np.take_along_axis(scale, at, axis=-1)  # (n, 1)
    inverse = np.where(most == 0, np.float32(0), np.float32(-32) / most)
    d = half_bytes(np.where(most == 0, np.float32(0), 1 / inverse))
    # Without a scale ggml leaves the six bits 0, which stand for -32.
    signed = np.where(most == 0, -32, np.rint(inverse * scale).clip(-32, 31)).astype(np.int8)
    step = (halves(d) * signed).ravel()
    again = np.rint(x / step).clip(-4, 3) + 4
    codes = np.where(step == 0, codes, again).astype(np.uint8)
    return _join(d, signed, np.ascontiguousarray(codes.T).reshape(-1, BLOCK))


def _search(x: Floats) -> tuple[Floats, Floats]:
    # [16, n] -> scale [n], codes 0..7 [16, n]: ggml's make_q3_quants, weights x * x.
    at = np.abs(x).argmax(axis=0, keepdims=True)
    most = np.take_along_axis(x, at, axis=0)[0]
    zero = np.abs(most) < _EPSILON
    weight = x * x
    codes = np.rint(np.float32(-4) / most * x).clip(-4, 3)
    sum_lx, sum_l2 = (weight * x * codes).sum(axis=0), (weight * codes * codes).sum(axis=0)
    for _ in range(5):
        for i, (one, w) in enumerate(zip(x, weight, strict=True)):
            old = codes[i]
            rest_lx, rest_l2 = sum_lx - w * one * old, sum_l2 - w * old * old
            new = np.rint(one * rest_l2 / rest_lx).clip(-4, 3)
            new_lx, new_l2 = rest_lx + w * one * new, rest_l2 + w * new * new
            better = (rest_lx > 0) & (new != old) & (new_l2 > 0)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            codes[i] = np.where(better, new, old)
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
    scale = np.where(zero | ~(sum_l2 > 0), np.float32(0), sum_lx / sum_l2)
    return scale, np.where(zero, 0, codes + 4)


def _join(d: Bytes, scales: Bytes, codes: Bytes) -> Bytes:
    # Row blocks [n, 110] from the bytes of d [n, 2], scales -32..31 [n, 16] and codes [n, 256].
    high = np.packbits(codes.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little").reshape(-1, 32)
    quarters = (codes & 3).reshape(-1, 2, 4, 32)  # (n, h, k, b)
    low = np.bitwise_or.reduce(quarters << _SHIFTS[:, None], axis=2).reshape(-1, 64)
    unsigned = (scales + 32).astype(np.uint8)
    nibbles = (unsigned[:, :8] & 15) | (unsigned[:, 8:] << 4)
    above = np.bitwise_or.reduce(unsigned.reshape(-1, 4, 4) >> 4 << _SHIFTS[:, None], axis=1)
    return np.concatenate([high, low, nibbles, above, d], axis=-1)


def _codes(blocks: Bytes) -> Bytes:
    # Codes 0..7 in the order of the inputs: [rows, n_blocks, 110] -> [rows, n_blocks, 256].
    shape = blocks.shape[:2]
    high = np.unpackbits(blocks[..., None, :32], axis=-2, bitorder="little")
    low = blocks[..., 32:96].reshape(*shape, 2, 1, 32) >> _SHIFTS[:, None] & 3
    codes: Bytes = low.reshape(*shape, BLOCK) | (high.reshape(*shape, BLOCK) << 2)
    return codes


def _scales(blocks: Bytes) -> Bytes:
    # Scales -32..31: [rows, n_blocks, 110] -> int8 [rows, n_blocks, 16].
    low = np.concatenate([blocks[..., 96:104] & 15, blocks[..., 96:104] >> 4], axis=-1)
    high = blocks[..., None, 104:108] >> _SHIFTS[:, None] & 3
    scales: Bytes = (low | high.reshape(low.shape) << 4).astype(np.int8) - np.int8(32)
    return scales


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    scales = halves(blocks[..., 108:]) * _scales(blocks)
    codes = _codes(blocks).astype(np.float32).reshape(*shape, 16, 16) - 4
    return as_rows((scales[..., None] * codes).reshape(*shape, BLOCK))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows, codes of 3 bits in threes of bytes: the tile block above."""
    padding = np.zeros((-len(raw) % TILE_ROWS, raw.shape[1]), np.uint8)  # zero is no scale of zero
    blocks = byte_blocks(np.concatenate([raw, padding]), BLOCK_BYTES)
    shape = blocks.shape[:2]
    g = np.moveaxis(_codes(blocks).reshape(*shape, 8, 8, 4), -2, 0)  # (group, .., c, i)
    first = g[0] | g[2] << 3 | g[6] << 6  # bit 2 of group 6 falls off
    second = g[1] | g[3] << 3 | g[7] << 6
    third = g[4] | g[5] << 3 | g[6] >> 2 << 6 | g[7] >> 2 << 7
    packed = np.stack([first, second, third], axis=-2).reshape(*shape, 96)
    scales = _scales(blocks).view(np.uint8)
    return interleave(np.concatenate([blocks[..., 108:], scales, packed], axis=-1), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    blocks = deinterleave(tiled, rows, RUNS)
    shape = blocks.shape[:2]
    first, second, third = np.moveaxis(blocks[..., 18:].reshape(*shape, 8, 3, 4), -2, 0)
    groups = [
        first, second, first >> 3, second >> 3, third, third >> 3,
        first >> 6 | (third >> 6 & 1) << 2, second >> 6 | third >> 7 << 2,
    ]  # fmt: skip
    codes = np.stack(groups, axis=-2).reshape(-1, BLOCK) & 7
    flat = blocks.reshape(-1, blocks.shape[-1])
    joined = _join(flat[:, :2], flat[:, 2:18].view(np.int8), codes)
    return as_rows(joined.reshape(*shape, BLOCK_BYTES))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    ones = repeat(splat_f32(1.0), tokens)
    for c in range(8):
        entry = load_q8(x + c * (48 * group), tokens)
        codes = w + (288 + 192 * c)
        sums = q8_i32(entry, 44)
        low = dot_init(shl(sums, 2), tiles)
        high = dot_init(shl(q8_i32(entry, 40) - sums, 2), tiles)
        v = load_eights(codes, tiles, stride)
        last = load_u8(codes + 128, tiles, stride)
        low = dot8(low, and_u8(v, 7), entry, 0, 4)
        low = dot8(low, and_u8(shr_u8(v, 3), 7), entry, 8, 4)
        high = dot8(high, and_u8(eights(last, shr_u8(last, 3)), 7), entry, 16, 4)
        above = and_u8(eights(shr_u8(last, 4), shr_u8(last, 5)), 4)
        high = dot8(high, shr_u8(v, 6) | above, entry, 24, 4)
        # The sub-blocks' sums are put together before d: an outer product less for each row.
        scale = outer(to_f32(load_i8_i32(w + (32 + 32 * c), tiles, stride)), ones)
        total = scale * to_f32(dot_result(low, 4))
        scale = outer(to_f32(load_i8_i32(w + (48 + 32 * c), tiles, stride)), ones)
        total = fma(scale, to_f32(dot_result(high, 4)), total)
        acc = fma(outer(d, q8_f32(entry, 32)), total, acc)
    return acc


def _store_scales(low: Any, high: Any, dst: Any) -> None:
    """Of 4 x 16 scales, bits 0..3 and bits 4..5 where they belong: less 32, as int8."""
    fives = splat_i32(0x20202020)
    flipped = bits_i32(low | high) ^ fives  # bit 5 is then the sign
    sign = flipped & fives
    store_i32(dst, flipped | shl(sign, 1) | shl(sign, 2), 0)


def _store_chunk(low: Any, up: Any, high: Any, top: Any, dst: Any) -> None:
    """Put together 8 groups of codes: bits 0..1 of `low` and `up`, and bit 0 of `high` and `top`.

    Groups 0..3 are in `low` and `high`, groups 4..7 in `up` and `top`.
    """
    first = and_u8(part(low, 0), 3) | and_u8(shl_u8(part(low, 2), 3), 24) | shl_u8(part(up, 2), 6)
    bits = and_u8(shl_u8(part(high, 0), 2), 4) | and_u8(shl_u8(part(high, 2), 5), 32)
    store_u8(dst, first | bits)
    second = and_u8(part(low, 1), 3) | and_u8(shl_u8(part(low, 3), 3), 24) | shl_u8(part(up, 3), 6)
    bits = and_u8(shl_u8(part(high, 1), 2), 4) | and_u8(shl_u8(part(high, 3), 5), 32)
    store_u8(dst + 64, second | bits)
    third = and_u8(part(up, 0), 3) | and_u8(shl_u8(part(up, 1), 3), 24)
    bits = and_u8(shl_u8(part(top, 0), 2), 4) | and_u8(shl_u8(part(top, 1), 5), 32)
    last = and_u8(shl_u8(part(top, 2), 6), 64) | shl_u8(part(top, 3), 7)
    store_u8(dst + 128, third | bits | last)


def _store_half(src: Any, row_bytes: Any, high: Any, top: Any, dst: Any) -> None:
    """4 chunks, of 32 bytes of qs and bits 0..3 of 32 of hmask."""
    low = load_runs(src, row_bytes, 4)
    up = load_runs(src + 16, row_bytes, 4)
    _store_chunk(low, up, high, top, dst)
    _store_chunk(shr_u8(low, 2), shr_u8(up, 2), shr_u8(high, 1), shr_u8(top, 1), dst + 192)
    _store_chunk(shr_u8(low, 4), shr_u8(up, 4), shr_u8(high, 2), shr_u8(top, 2), dst + 384)
    _store_chunk(shr_u8(low, 6), shr_u8(up, 6), shr_u8(high, 3), shr_u8(top, 3), dst + 576)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    high = load_runs(src, row_bytes, 4)
    top = load_runs(src + 16, row_bytes, 4)
    _store_half(src + 32, row_bytes, high, top, dst + 288)
    _store_half(src + 64, row_bytes, shr_u8(high, 4), shr_u8(top, 4), dst + 1056)
    by_byte = load_runs(src + 92, row_bytes, 1)
    first, second, third = part(by_byte, 1), part(by_byte, 2), part(by_byte, 3)
    _store_scales(and_u8(first, 15), and_u8(shl_u8(third, 4), 48), dst + 32)
    _store_scales(and_u8(second, 15), and_u8(shl_u8(third, 2), 48), dst + 96)
    _store_scales(shr_u8(first, 4), and_u8(third, 48), dst + 160)
    _store_scales(shr_u8(second, 4), and_u8(shr_u8(third, 2), 48), dst + 224)
    interleave_halves(src + 108, row_bytes, dst)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for c in range(8):
        one = d * f32(get_i8(w + (32 + 32 * c + lane)))
        two = d * f32(get_i8(w + (48 + 32 * c + lane)))
        for i in range(4):
            at = w + (288 + 192 * c + lane * 4 + i)
            first, second, third = get_u8(at), get_u8(at + 64), get_u8(at + 128)
            to = out + (32 * c + i) * 4
            put_f32(to, one * f32((first & 7) - 4))
            put_f32(to + 16, one * f32((second & 7) - 4))
            put_f32(to + 32, one * f32(((first >> 3) & 7) - 4))
            put_f32(to + 48, one * f32(((second >> 3) & 7) - 4))
            put_f32(to + 64, two * f32((third & 7) - 4))
            put_f32(to + 80, two * f32(((third >> 3) & 7) - 4))
            put_f32(to + 96, two * f32((first >> 6 | (third >> 4) & 4) - 4))
            put_f32(to + 112, two * f32((second >> 6 | (third >> 5) & 4) - 4))


FORMAT = Format(
    name="q3_k",
    ggml_type="Q3_K",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=1824,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
)
