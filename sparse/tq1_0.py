"""TQ1_0: 256 ternary weights share a float16 scale `d`, 5 to a byte. 1.6875 bits.

A byte is 256/243 of a number of 5 digits to the base 3, rounded up: times 3^n, its lower 8 bits are
256/3 of digit n and what follows it, so that digit n is the third of 0..255 in
which they are. A weight is
`d * (digit - 1)`.
Source: `block_tq1_0` of ggml-common.h, `quantize_row_tq1_0_ref` of ggml-quants.c.

Row block, 54 bytes (raw):
    bytes         what
    b             b < 32: digit n = input 32n + b, n = 0..4
    32 + b        b < 16: digit n = input 160 + 16n + b, n = 0..4
    48 + b        b < 4: digit n = input 240 + 4n + b, n = 0..3
    52..53        d, float16

Tile block, 864 bytes (16 rows r, i = 0..3):
    bytes                 what
    2r .. 2r+1            d of row r
    32 + 64j + 4r + i     byte 4j + i of row r, j = 0..12
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
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_halves, interleave_words, load_eights
from headrace.targets.simd import (
    dot8,
    dot_init,
    dot_result,
    eights,
    f32,
    fma,
    get_f16,
    get_u8,
    get_u16,
    load_f16,
    load_q8,
    load_u8,
    outer,
    put_f32,
    put_u16,
    q8_f32,
    q8_i32,
    third_u8,
    to_f32,
    xor_u8,
)

BLOCK = 256
BLOCK_BYTES = 54
CODE_BYTES = 52
RUNS = ((2, 2), (CODE_BYTES, 4))
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
_FIELDS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))  # bytes, and digits of each


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Round to multiples of the largest magnitude, halves away from zero."""
    blocks = weight_blocks(x, BLOCK)
    d = np.abs(blocks).max(axis=-1, keepdims=True)
    scaled = blocks * np.where(d == 0, np.float32(0), 1 / d)
    digits = (np.sign(scaled) * (np.abs(scaled) >= 0.5) + 1).astype(np.uint8)
    return as_rows(np.concatenate([pack(digits), half_bytes(d)], axis=-1))


def pack(digits: Bytes) -> Bytes:
    """Bytes [rows, n_blocks, 52] of digits 0..2 [rows, n_blocks, 256]."""
    shape, at, fields = digits.shape[:2], 0, []
    for first, last, n in _FIELDS:
        some = digits[..., at : at + n * (last - first)].reshape(*shape, n, last - first)
        places = _POWERS[::-1][:n, None].astype(np.uint32)
        number = (some * places).sum(axis=-2, dtype=np.uint32)
        fields.append(((number * 256 + 242) // 243).astype(np.uint8))
        at += n * (last - first)
    return np.concatenate(fields, axis=-1)


def unpack(packed: Bytes) -> Bytes:
    """Undo `pack`, of any bytes."""
    shape, fields = packed.shape[:2], []
    for first, last, n in _FIELDS:
        rest = packed[..., None, first:last] * _POWERS[:n, None]  # modulo 256
        fields.append((rest.astype(np.uint16) * 3 >> 8).reshape(*shape, -1))
    return np.concatenate(fields, axis=-1).astype(np.uint8)


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    levels = unpack(blocks[..., :CODE_BYTES]).astype(np.float32) - 1
    return as_rows(halves(blocks[..., CODE_BYTES:]) * levels)


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[..., :CODE_BYTES] = pack(codes)


GRID = scaled_grid(BLOCK, BLOCK_BYTES, (-1, 0, 1), _put, field=slice(CODE_BYTES, BLOCK_BYTES))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    return interleave(np.roll(blocks, BLOCK_BYTES - CODE_BYTES, axis=-1), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(np.roll(deinterleave(tiled, rows, RUNS), CODE_BYTES - BLOCK_BYTES, axis=-1))


def _load(w: Any, tiles: Any, stride: Any) -> Any:
    """128 bytes of each tile less 128, as `third_u8` takes them; three times that is so, too."""
    return xor_u8(load_eights(w, tiles, stride), 128)


def _tripled(v: Any) -> Any:
    return v + v + v


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    d = load_f16(w, tiles, stride)
    v0, v1 = _load(w + 32, tiles, stride), _load(w + 160, tiles, stride)
    v2, v3 = _load(w + 288, tiles, stride), _load(w + 416, tiles, stride)
    for c in range(5):
        entry = load_q8(x + c * (48 * group), tokens)
        total = dot_init(q8_i32(entry, 40), tiles)
        total = dot8(total, third_u8(v0), entry, 0, 4)
        total = dot8(total, third_u8(v1), entry, 8, 4)
        total = dot8(total, third_u8(v2), entry, 16, 4)
        total = dot8(total, third_u8(v3), entry, 24, 4)
        acc = fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, 4)), acc)
        v0, v1, v2, v3 = _tripled(v0), _tripled(v1), _tripled(v2), _tripled(v3)
    v0, v1 = _load(w + 544, tiles, stride), _load(w + 672, tiles, stride)
    for c in range(5, 7):
        entry = load_q8(x + c * (48 * group), tokens)
        total = dot_init(q8_i32(entry, 40), tiles)
        total = dot8(total, third_u8(v0), entry, 0, 4)
        total = dot8(total, third_u8(v1), entry, 8, 4)
        v0, v1 = _tripled(v0), _tripled(v1)
        total = dot8(total, third_u8(v0), entry, 16, 4)
        total = dot8(total, third_u8(v1), entry, 24, 4)
        v0, v1 = _tripled(v0), _tripled(v1)
        acc = fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, 4)), acc)
    entry = load_q8(x + 7 * (48 * group), tokens)
    total = dot_init(q8_i32(entry, 40), tiles)
    total = dot8(total, third_u8(v0), entry, 0, 4)
    total = dot8(total, third_u8(v1), entry, 8, 4)
    v = xor_u8(load_u8(w + 800, tiles, stride), 128)
    v = eights(v, _tripled(v))
    total = dot8(total, third_u8(v), entry, 16, 4)
    total = dot8(total, third_u8(_tripled(_tripled(v))), entry, 24, 4)
    return fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, 4)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src + CODE_BYTES, row_bytes, dst)
    interleave_words(src, row_bytes, dst + 32, 12)
    for row in range(16):
        for half in range(0, 4, 2):
            put_u16(dst + (800 + row * 4 + half), get_u16(src + (row * row_bytes + 48 + half)))


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 256 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for b in range(CODE_BYTES):
        rest = get_u8(w + (32 + b // 4 * 64 + lane * 4 + b % 4))
        first, step, n = b, 32, 5
        if b >= 48:
            first, step, n = 240 + b - 48, 4, 4
        elif b >= 32:
            first, step = 160 + b - 32, 16
        for k in range(n):
            put_f32(out + (first + k * step) * 4, d * f32(((rest * 3) >> 8) - 1))
            rest = rest * 3 & 255


FORMAT = Format(
    name="tq1_0",
    ggml_type="TQ1_0",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=864,
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
