"""Q8_0: 32 weights share a float16 scale `d`; a weight is `d * code`, code int8. 8.5 bits.

Source: `block_q8_0` of ggml-common.h, `quantize_row_q8_0_ref` of ggml-quants.c.

Row block, 34 bytes (raw):
    bytes      what
    0..1       d, float16
    2..33      code of inputs 0..31, int8

Tile block, 544 bytes (16 rows r, 8 groups j of 4 bytes i):
    bytes                 what
    2r .. 2r+1            d of row r
    32 + 64j + 4r + i     code of input 4j + i of row r
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
    dot_start,
    f32,
    fma,
    get_f16,
    get_i8,
    load_f16,
    load_q8,
    outer,
    put_f32,
    q8_f32,
    to_f32,
)

BLOCK = 32
BLOCK_BYTES = 34
RUNS = ((2, 2), (32, 4))


@np.errstate(all="ignore")
def encode(x: Floats) -> Bytes:
    """Quantise with the largest magnitude at code 127 or -127, halves away from zero."""
    blocks = weight_blocks(x, BLOCK)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / 127  # (rows, n_blocks, 1)
    scaled = blocks * np.where(d == 0, np.float32(0), 1 / d)
    size = np.abs(scaled)
    whole = np.floor(size)
    # Not floor(size + 0.5): that sum rounds 0.49999997 up to 1.
    codes = np.sign(scaled) * (whole + np.floor(2 * (size - whole)))
    return as_rows(np.concatenate([half_bytes(d), codes.astype(np.int8).view(np.uint8)], axis=-1))


@np.errstate(all="ignore")
def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    blocks = byte_blocks(raw, BLOCK_BYTES)
    codes = blocks[..., 2:].view(np.int8).astype(np.float32)
    return as_rows(codes * halves(blocks[..., :2]))


def _put(blocks: Bytes, codes: Bytes) -> None:
    blocks[..., 2:] = codes - np.uint8(127)


GRID = scaled_grid(BLOCK, BLOCK_BYTES, range(-127, 128), _put)


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
    total = dot8(total, load_eights(w + 32, tiles, stride), entry, 0, 8)
    total = dot8(total, load_eights(w + 160, tiles, stride), entry, 8, 8)
    total = dot8(total, load_eights(w + 288, tiles, stride), entry, 16, 8)
    total = dot8(total, load_eights(w + 416, tiles, stride), entry, 24, 8)
    scale = outer(load_f16(w, tiles, stride), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 8)), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One block of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)
    interleave_words(src + 2, row_bytes, dst + 32, 8)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The 32 weights of row `lane` of a tile block."""
    d = get_f16(w + lane * 2)
    for i in range(32):
        code = get_i8(w + (32 + i // 4 * 64 + lane * 4 + i % 4))
        put_f32(out + i * 4, d * f32(code))


FORMAT = Format(
    name="q8_0",
    ggml_type="Q8_0",
    block=BLOCK,
    block_bytes=BLOCK_BYTES,
    tile_block_bytes=544,
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
