"""BF16: the upper 16 bits of a float32, no blocks.

Row, 2 bytes a weight (raw):
    bytes               what
    2k .. 2k+1          weight of input k, little-endian

Tile block, 32 bytes (16 rows r of one input; any number of inputs):
    bytes               what
    2r .. 2r+1          weight of row r
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
from headrace.sparse.interleaving import interleave_halves
from headrace.targets.simd import (
    bcast_f32,
    copy_runs,
    fma_outer,
    get_bf16,
    load_bf16,
    put_f32,
)

RUNS = ((2, 2),)


def encode(x: Floats) -> Bytes:
    """Round to nearest even, NaN to a quiet NaN, as `ggml_compute_fp32_to_bf16` does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 64, rounded).astype(np.uint16).view(np.uint8)


def decode(raw: Bytes) -> Floats:
    """Give the float32 weights."""
    upper = np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32)
    return (upper << 16).view(np.float32)


def tile(raw: Bytes) -> Bytes:
    """Put the weights of 16 rows side by side, input by input."""
    return interleave(byte_blocks(raw, 2), RUNS)


def untile(tiled: Bytes, rows: int) -> Bytes:
    """Give back the raw bytes of the first `rows` rows."""
    return as_rows(deinterleave(tiled, rows, RUNS))


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one input of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
    return fma_outer(load_bf16(w, tiles, stride), bcast_f32(x, tokens, 4), acc)


def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
    """One weight of each of 16 raw rows to a tile block."""
    interleave_halves(src, row_bytes, dst)


def tile_line(src: Any, row_bytes: Any, dst: Any) -> None:
    """A cache line of each of 16 raw rows, 32 inputs, to as many tile blocks."""
    for k in range(4):
        copy_runs(dst + k * 256, src + k * 16, row_bytes, 2)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The weight of row `lane` of a tile block."""
    put_f32(out, get_bf16(w + lane * 2))


FORMAT = Format(
    name="bf16",
    ggml_type="BF16",
    block=1,
    block_bytes=2,
    tile_block_bytes=32,
    activation="f32",
    encode=encode,
    decode=decode,
    tile=tile,
    untile=untile,
    product=product,
    tile_block=tile_block,
    row_block=row_block,
    tile_run=(32, tile_line),
)
