"""IQ4_NL: 32 weights share a float16 scale `d`; a weight is `d` times one of 16 values. 4.5 bits.

The values (`IQ4` of `headrace.sparse.lookup`) lie closer together near zero.
Source: `block_iq4_nl` of ggml-common.h; `quantize_row_iq4_nl_ref` and `quantize_row_iq4_nl_impl`
of ggml-quants.c.

Row block, 18 bytes (raw):
    bytes      what
    0..1       d, float16
    2..17      qs: byte b = code of input b (low nibble) | code of input 16 + b (high nibble)

Tile block, 288 bytes (16 rows r, 4 groups j of 4 bytes i):
    bytes                 what
    2r .. 2r+1            d of row r
    32 + 64j + 4r + i     qs byte 4j + i of row r: input 4j + i low, input 16 + 4j + i high
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
    pack_nibbles,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_halves, interleave_words, load_eights
from headrace.sparse.lookup import IQ4, IQ4_HIGH, IQ4_LOW, search_iq4, table_value
from headrace.targets.simd import (
    dot16,
    dot_init,
    dot_result,
    dot_start,
    f32,
    fma,
    get_f16,
    get_u8,
    load_f16,
    load_q8,
    lookup16,
    outer,
    put_f32,
    q8_f32,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 18
RUNS = ((2, 2), (16, 4))


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the weight of largest magnitude at -127, then fit the scale, as ggml does."""
    blocks = weight_blocks(x, BLOCK)
    d, codes = search_iq4(blocks.reshape(-1, BLOCK))
    raw = np.concatenate([half_bytes(d[:, None]), pack_nibbles(codes)], axis=-1)
    return as_rows(raw.reshape(*blocks.shape[:2], BLOCK_BYTES))


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    values = IQ4[unpack_nibbles(blocks[..., 2:])].astype(np.float32)
    return as_rows(halves(blocks[..., :2]) * values)


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[..., 2:] = pack_nibbles(codes)


GRID = scaled_grid(BLOCK, BLOCK_BYTES, IQ4.tolist(), _put)


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
    v = load_eights(w + 32, tiles, stride)
    low = lookup16(v, 0, IQ4_LOW, IQ4_HIGH, 8)
    high = lookup16(v, 4, IQ4_LOW, IQ4_HIGH, 8)
    total = dot16(total, low, high, entry, 0, 8)
    v = load_eights(w + 160, tiles, stride)
    low = lookup16(v, 0, IQ4_LOW, IQ4_HIGH, 8)
    high = lookup16(v, 4, IQ4_LOW, IQ4_HIGH, 8)
    total = dot16(total, low, high, entry, 8, 8)
    scale = outer(load_f16(w, tiles, stride), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 8)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)
    interleave_words(src + 2, row_bytes, dst + 32, 4)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 32 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for i in range(16):
        both = get_u8(w + (32 + i // 4 * 64 + lane * 4 + i % 4))
        put_f32(out + i * 4, d * f32(table_value(IQ4_LOW, IQ4_HIGH, both & 15)))
        put_f32(out + (16 + i) * 4, d * f32(table_value(IQ4_LOW, IQ4_HIGH, both >> 4)))


FORMAT = Format(
    name="iq4_nl",
    ggml_type="IQ4_NL",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=288,
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
