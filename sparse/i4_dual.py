"""4-bit integers with dual-grained scales: an integer for 32 weights, a float for 256. 4.1875 bits.

A weight is `d * s * (code - 8)`, s = 1..15: `s * (code - 8)` is an INT8 number, exactly, from -120
to 105, so a processor that multiplies whole rows of INT8 can be given these. It is smaller than
groups of 64 with a float16 each and has less noise: by 0.25 dB of normal weights, more where their
sizes differ. Here sums of codes are multiplied by s, which is the same and is done once for 32 of
them: activations have a scale for each 32, so that sums become floats there anyway. Source:
dual-grained quantization (arXiv 2310.04836), whose float belongs to a row; in blocks of 256 it
costs 0.06 bits and pieces of rows stay independent.

Row block, 134 bytes (raw), groups g = 0..7:
    bytes              what
    0..1               d, float16
    2..5               byte p = s of group 2p (low nibble) | s of group 2p + 1 (high nibble)
    6 + 16g + b        code of input 32g + b (low nibble) | code of input 32g + 16 + b (high nibble)

Tile block, 2144 bytes (16 rows r, groups of 4 bytes j, i as in `headrace.sparse.q4_0`):
    bytes                         what
    2r .. 2r+1                    d of row r
    32 + 16p + r                  byte p of the scales of row r
    96 + 256g + 64j + 4r + i      qs byte 16g + 4j + i of row r
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
from headrace.sparse.int4_search import search
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
    load_u8_i32,
    outer,
    put_f32,
    put_u8,
    q8_f32,
    q8_shifted,
    shr,
    shr_u8,
    splat_i32,
    to_f32,
)

BLOCK = 256
GROUPS = 8
BLOCK_BYTES = 134
RUNS = ((2, 2), (4, 1), (128, 4))
CHUNK = 256  # blocks that are searched at once: temporaries stay in cache
# The largest group's scale meets 15, or is cut to it: tried in this order.
SHARES = (1.0, 1.06, 1.03, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.65)


def encode(x: Floats) -> Bytes:
    """Quantise to nearest; d and s are those of least squared error of some that are tried.

    Scales of groups alone (`headrace.sparse.int4_search`) are divided by d, for some d.
    """
    blocks = weight_blocks(x, BLOCK)
    flat = blocks.reshape(-1, GROUPS, BLOCK // GROUPS)
    raw = np.empty((len(flat), BLOCK_BYTES), np.uint8)
    for at in range(0, len(flat), CHUNK):
        raw[at : at + CHUNK] = _encode_blocks(flat[at : at + CHUNK])
    return as_rows(raw.reshape(*blocks.shape[:2], BLOCK_BYTES))


@np.errstate(all="ignore")
def _encode_blocks(x: Floats) -> Bytes:
    n = len(x)
    alone = search(x.reshape(n * GROUPS, -1), False, positive=True)[0].reshape(n, GROUPS)
    best = np.full(n, np.inf, np.float32)
    d, s = np.zeros(n, np.float32), np.ones((n, GROUPS), np.float32)
    for share in SHARES:
        tried = (alone.max(axis=1) * np.float32(share / 15)).astype(np.float16).astype(np.float32)
        steps = np.rint(alone / np.where(tried == 0, np.float32(1), tried)[:, None]).clip(1, 15)
        scale = (tried[:, None] * steps)[..., None]
        error = ((_codes(x, scale) * scale - x) ** 2).sum(axis=(1, 2))
        better = error < best
        best, d = np.where(better, error, best), np.where(better, tried, d)
        s = np.where(better[:, None], steps, s)
    codes = (_codes(x, (d[:, None] * s)[..., None]) + 8).astype(np.uint8)
    small = s.astype(np.uint8)
    scales = small[:, 0::2] | (small[:, 1::2] << 4)
    return np.concatenate([half_bytes(d[:, None]), scales, pack_nibbles(codes).reshape(n, -1)], 1)


def _codes(x: Floats, scale: Floats) -> Floats:
    inverse = np.where(scale == 0, np.float32(0), 1 / scale)
    codes: Floats = np.rint(x * inverse).clip(-8, 7)
    return codes


def int8_weights(raw: Bytes) -> Bytes:
    """The integers s * (code - 8) of raw rows: int8 [rows, n]."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    shape = blocks.shape[:2]
    s = np.stack([blocks[..., 2:6] & 15, blocks[..., 2:6] >> 4], axis=-1).reshape(*shape, GROUPS, 1)
    codes = unpack_nibbles(blocks[..., 6:].reshape(*shape, GROUPS, 16)).astype(np.int8) - np.int8(8)
    return as_rows((s.astype(np.int8) * codes).reshape(*shape, BLOCK))


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    d = halves(byte_blocks(raw, BLOCK_BYTES)[..., :2])
    eights = int8_weights(raw).astype(np.float32).reshape(*d.shape[:2], BLOCK)
    return as_rows(d * eights)


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    return interleave(byte_blocks(raw, BLOCK_BYTES), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    for p in range(4):
        two = load_u8_i32(w + (32 + 16 * p), tiles, stride)
        at = w + (96 + 512 * p)
        s = two & splat_i32(15)
        acc = _add_group(acc, at, d * to_f32(s), stride, x + 2 * p * (48 * group), tokens, tiles)
        s = shr(two, 4)
        entry = x + (2 * p + 1) * (48 * group)
        acc = _add_group(acc, at + 256, d * to_f32(s), stride, entry, tokens, tiles)
    return acc


def _add_group(acc: Any, w: Any, d: Any, stride: Any, x: Any, tokens: Any, tiles: Any) -> Any:
    entry = load_q8(x, tokens)
    total = dot_init(q8_shifted(entry, 40, 3), tiles)
    v = load_eights(w, tiles, stride)
    total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 0, 4)
    v = load_eights(w + 128, tiles, stride)
    total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 8, 4)
    return fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, 4)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)
    for row in range(16):
        for p in range(4):
            put_u8(dst + (32 + 16 * p + row), get_u8(src + (row * row_bytes + 2 + p)))
    interleave_words(src + 6, row_bytes, dst + 96, 32)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for g in range(8):
        s = (get_u8(w + (32 + 16 * (g // 2) + lane)) >> (4 * (g % 2))) & 15
        for i in range(16):
            both = get_u8(w + (96 + 256 * g + i // 4 * 64 + lane * 4 + i % 4))
            to = out + (32 * g + i) * 4
            put_f32(to, d * f32(s * ((both & 15) - 8)))
            put_f32(to + 64, d * f32(s * ((both >> 4) - 8)))


FORMAT = Format(
    name="i4_dual",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=2144,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
)
