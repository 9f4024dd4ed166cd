"""MXFP4: 32 weights share a power of two; a weight is that times an E2M1 number. 4.25 bits.

Codes stand for E2M1 numbers doubled (`headrace.sparse.lookup`), so the scale is half of E8M0's
(`headrace.sparse.e8m0`). Source: `block_mxfp4` of ggml-common.h, `quantize_row_mxfp4_ref` of
ggml-quants.c.

Row block, 17 bytes (raw):
    bytes      what
    0          e
    1..16      qs: byte b = code of input b (low nibble) | code of input 16 + b (high nibble)

Tile block, 272 bytes (16 rows r, 4 groups j of 4 bytes i):
    bytes                 what
    r                     e of row r
    16 + 64j + 4r + i     qs byte 4j + i of row r: input 4j + i low, input 16 + 4j + i high
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.block_grid import scaled_grid
from headrace.sparse.e8m0 import get_half_scale, half_scales
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
from headrace.sparse.interleaving import interleave_bytes, interleave_words, load_eights
from headrace.sparse.lookup import E2M1, E2M1_HIGH, E2M1_LOW, nearest_e2m1, table_value
from headrace.targets.simd import (
    SMALL,
    dot16,
    dot_init,
    dot_result,
    dot_start,
    f32,
    fma,
    get_u8,
    load_e8m0,
    load_q8,
    lookup16,
    outer,
    put_f32,
    q8_f32,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 17
RUNS = ((1, 1), (16, 4))


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the largest magnitude between 4 and 8 times the scale, as ggml does."""
    blocks = weight_blocks(x, BLOCK)
    most = np.abs(blocks).max(axis=-1, keepdims=True)  # (rows, n_blocks, 1)
    e = np.where(most > 0, np.floor(np.log2(most)) + 125, 0).astype(np.uint8)
    codes = nearest_e2m1(blocks, half_scales(e))
    return as_rows(np.concatenate([e, pack_nibbles(codes)], axis=-1))


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    values = E2M1[unpack_nibbles(blocks[..., 1:])].astype(np.float32)
    return as_rows(half_scales(blocks[..., :1]) * values)


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[..., 1:] = pack_nibbles(codes)


def _exponent(scale: Floats) -> Bytes:
    # The byte of the power of two next to a scale, by its logarithm.
    known = np.log2(scale.clip(2.0**-126, 2.0**126))
    return np.where(scale > 0, np.rint(known) + 128, 0).astype(np.uint8)


GRID = scaled_grid(
    BLOCK,
    BLOCK_BYTES,
    E2M1.tolist(),
    _put,
    field=slice(0, 1),
    to_bytes=_exponent,
    of_bytes=half_scales,
    allowed=lambda scale: half_scales(_exponent(np.abs(scale))),
)


def tile(raw: Bytes) -> Bytes:
    """Interleave 16 rows: the tile block above."""
    return interleave(byte_blocks(raw, BLOCK_BYTES), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    entry = load_q8(x, tokens)
    total = dot_init(dot_start(entry, 40, SMALL), tiles)
    v = load_eights(w + 16, tiles, stride)
    low = lookup16(v, 0, E2M1_LOW, E2M1_HIGH, SMALL)
    high = lookup16(v, 4, E2M1_LOW, E2M1_HIGH, SMALL)
    total = dot16(total, low, high, entry, 0, SMALL)
    v = load_eights(w + 144, tiles, stride)
    low = lookup16(v, 0, E2M1_LOW, E2M1_HIGH, SMALL)
    high = lookup16(v, 4, E2M1_LOW, E2M1_HIGH, SMALL)
    total = dot16(total, low, high, entry, 8, SMALL)
    scale = outer(load_e8m0(w, tiles, stride), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, SMALL)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_bytes(src, row_bytes, dst)
    interleave_words(src + 1, row_bytes, dst + 16, 4)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 32 weights of row `lane` of a tile block."""
    d = get_half_scale(w + lane)
    for i in range(16):
        both = get_u8(w + (16 + i // 4 * 64 + lane * 4 + i % 4))
        put_f32(out + i * 4, d * f32(table_value(E2M1_LOW, E2M1_HIGH, both & 15)))
        put_f32(out + (16 + i) * 4, d * f32(table_value(E2M1_LOW, E2M1_HIGH, both >> 4)))


FORMAT = Format(
    name="mxfp4",
    ggml_type="MXFP4",
    modules=("mxfp4", "e8m0"),
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=272,
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
