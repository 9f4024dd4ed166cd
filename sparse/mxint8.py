"""MXINT8: 32 weights share a power of two; a weight is that times int8 `code / 64`. 8.25 bits.

Source: the OCP Microscaling Formats specification, version 1.0; the power is E8M0
(`headrace.sparse.e8m0`). GGML has no such type: only files of our own hold it.

Row block, 33 bytes (raw):
    bytes      what
    0          e
    1..32      code of inputs 0..31, int8

Tile block, 528 bytes (16 rows r, 8 groups j of 4 bytes i):
    bytes                 what
    r                     e of row r
    16 + 64j + 4r + i     code of input 4j + i of row r
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.e8m0 import get_half_scale, half_scales
from headrace.sparse.format import (
    Bytes,
    Floats,
    Format,
    as_rows,
    byte_blocks,
    deinterleave,
    interleave,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_bytes, interleave_words, load_eights
from headrace.targets.simd import (
    dot8,
    dot_init,
    dot_result,
    dot_start,
    f32,
    fma,
    get_i8,
    load_e8m0,
    load_q8,
    outer,
    put_f32,
    q8_f32,
    splat_f32,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 33
RUNS = ((1, 1), (32, 4))
UNIT = 2.0**-5  # of half of a scale


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the least power that leaves codes in -127..127, to nearest, ties to even."""
    blocks = weight_blocks(x, BLOCK)
    most = np.abs(blocks).max(axis=-1, keepdims=True)  # (rows, n_blocks, 1)
    digits, power = np.frexp(most / 127)
    e = np.where(most > 0, power - (digits == 0.5) + (127 + 6), 0).clip(0, 254).astype(np.uint8)
    codes = np.rint(blocks / (half_scales(e) * np.float32(UNIT))).clip(-127, 127)
    return as_rows(np.concatenate([e, codes.astype(np.int8).view(np.uint8)], axis=-1))


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    codes = blocks[..., 1:].view(np.int8).astype(np.float32)
    return as_rows(codes * (half_scales(blocks[..., :1]) * np.float32(UNIT)))


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    return interleave(byte_blocks(raw, BLOCK_BYTES), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    entry = load_q8(x, tokens)
    total = dot_init(dot_start(entry, 40, 8), tiles)
    total = dot8(total, load_eights(w + 16, tiles, stride), entry, 0, 8)
    total = dot8(total, load_eights(w + 144, tiles, stride), entry, 8, 8)
    total = dot8(total, load_eights(w + 272, tiles, stride), entry, 16, 8)
    total = dot8(total, load_eights(w + 400, tiles, stride), entry, 24, 8)
    d = load_e8m0(w, tiles, stride) * splat_f32(UNIT)
    scale = outer(d, q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 8)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_bytes(src, row_bytes, dst)
    interleave_words(src + 1, row_bytes, dst + 16, 8)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 32 weights of row `lane` of a tile block."""
    d = get_half_scale(w + lane) * f32(UNIT)
    for i in range(32):
        code = get_i8(w + (16 + i // 4 * 64 + lane * 4 + i % 4))
        put_f32(out + i * 4, d * f32(code))


FORMAT = Format(
    name="mxint8",
    modules=("mxint8", "e8m0"),
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=528,
    activation="q8",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
)
