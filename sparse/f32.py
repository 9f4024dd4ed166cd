"""F32: IEEE single precision, no blocks.

Row, 4 bytes a weight (raw):
    bytes               what
    4k .. 4k+3          weight of input k, little-endian

Tile block, 64 bytes (16 rows r of one input; any number of inputs):
    bytes               what
    4r .. 4r+3          weight of row r
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
    interleave,
)
from headrace.sparse.interleaving import interleave_words
from headrace.targets.simd import (
    bcast_f32,
    fma_outer,
    get_f32,
    load_f32,
    put_f32,
)

RUNS = ((4, 4),)


def encode(x: Floats) -> Bytes:
    """Give the bytes of the weights."""
    return np.ascontiguousarray(x, np.float32).view(np.uint8)


def decode(raw: Bytes) -> Floats:
    """Give the weights."""
    return np.ascontiguousarray(raw).view(np.float32)


def tile(raw: Bytes) -> Bytes:
    """Put the weights of 16 rows side by side, input by input."""
    return interleave(byte_blocks(raw, 4), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one input of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    return fma_outer(load_f32(w, tiles, stride), bcast_f32(x, tokens, 4), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One weight of each of 16 raw rows to a tile block."""
    for row in range(16):
        put_f32(dst + row * 4, get_f32(src + row * row_bytes))


def tile_line(src: Any, row_bytes: Any, dst: Any) -> None:
    """A cache line of each of 16 raw rows, 16 inputs, to as many tile blocks."""
    interleave_words(src, row_bytes, dst, 16)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The weight of row `lane` of a tile block."""
    put_f32(out, get_f32(w + lane * 4))


FORMAT = Format(
    name="f32",
    ggml_type="F32",
    block=1,
    block_bytes=4,
    tile_block_bytes=64,
    activation="f32",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
    tile_run=(16, tile_line),
)
