"""The plain form of sparse blocks of 32 weights, made dense in the cache: what is multiplied.

A tile block of it, 576 bytes: the scales of 16 rows as float32, then bytes code + 8 of all 32
inputs, 4 of each row side by side; a weight is scale * code, code -8..7. See `format.Unpacked`.

Such formats (`format_of`) have raw blocks alike: a float16 scale, 4 bytes that say which weights
are kept, and the codes of these, 4 bits each as two's complement. Their tile blocks have 16 times
the scale, then the rest of 16 rows in runs of 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.sparse.format import (
    TILE_ROWS,
    Bytes,
    Floats,
    Format,
    Unpacked,
    as_rows,
    byte_blocks,
    deinterleave,
    halves,
    interleave,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_halves, load_eights
from headrace.sparse.pattern import PutKept, pattern_of_int4
from headrace.targets.simd import (
    dot8,
    dot_init,
    dot_result,
    f32,
    fma,
    get_f32,
    get_u8,
    get_u16,
    load_f32,
    load_q8,
    outer,
    put_f32,
    put_u16,
    q8_f32,
    q8_shifted,
    to_f32,
)

BLOCK = 32
TILE_BLOCK_BYTES = 64 + 16 * BLOCK
KEPT, QS = 2, 6  # of a raw block: where it says what is kept, and where codes begin


def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + one plain block of `tiles` tiles times `tokens` tokens."""
    entry = load_q8(x, tokens)
    total = dot_init(q8_shifted(entry, 40, 3), tiles)
    total = dot8(total, load_eights(w + 64, tiles, stride), entry, 0, 4)
    total = dot8(total, load_eights(w + 192, tiles, stride), entry, 8, 4)
    total = dot8(total, load_eights(w + 320, tiles, stride), entry, 16, 4)
    total = dot8(total, load_eights(w + 448, tiles, stride), entry, 24, 4)
    scale = outer(load_f32(w, tiles, stride), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 4)), acc)


def row_block(w: Any, lane: Any, out: Any) -> None:
    """The weights of row `lane` of a plain block."""
    scale = get_f32(w + lane * 4)
    for i in range(BLOCK):
        code = get_u8(w + (64 + i // 4 * 64 + lane * 4 + i % 4)) - 8
        put_f32(out + i * 4, scale * f32(code))


def format_of(
    name: str, module: str, kept: int, of: int, *, put: PutKept,
    codes: Callable[[Bytes], NDArray[np.uint8]], unpack: Callable[..., None],
) -> Format:  # fmt: skip
    """A format that keeps `kept` of each `of` weights.

    Args:
        module: of `headrace.sparse`, where it is.
        put: see `headrace.sparse.pattern`.
        codes: raw blocks [rows, blocks, block_bytes] -> codes 0..15 [rows, blocks, 32], 0 for what
            is not kept.
        unpack: native, a tile block, a table and a plain block.
    """
    block_bytes = QS + BLOCK * kept // of // 2
    runs = ((KEPT, 2), (QS - KEPT, 4), (block_bytes - QS, 4))
    words = (block_bytes - KEPT) // 2
    pattern = pattern_of_int4(kept, of, BLOCK, block_bytes, put)

    def encode(x: Floats) -> Bytes:
        """Keep the larger weights; quantise them to nearest with searched scales."""
        weight_blocks(x, BLOCK)  # refuses rows of another length
        return pattern.encode(x)

    @np.errstate(all="ignore")
    def decode(raw: Bytes) -> Floats:
        """Give the float32 weights."""
        blocks = byte_blocks(raw, block_bytes)
        signed = (codes(blocks).astype(np.int8) ^ 8) - 8
        return as_rows(halves(blocks[..., :KEPT]) * signed.astype(np.float32))

    def tile(raw: Bytes) -> Bytes:
        """Interleave 16 rows: the tile block above."""
        return interleave(byte_blocks(raw, block_bytes), runs)

    def untile(tiled: Bytes, rows: int) -> Bytes:
        """Give back the raw bytes of the first `rows` rows."""
        return as_rows(deinterleave(tiled, rows, runs))

    def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
        """One block of 16 raw rows to a tile block."""
        interleave_halves(src, row_bytes, dst)
        for row in range(16):
            for i in range(words):
                word = get_u16(src + (row * row_bytes + 2 + 2 * i))
                put_u16(dst + (32 + i // 2 * 64 + row * 4 + i % 2 * 2), word)

    return Format(
        name=name,
        modules=(module, "dense_int8"),
        block=BLOCK,
        block_bytes=block_bytes,
        tile_block_bytes=TILE_ROWS * block_bytes,
        activation="q8",
        encode=encode,
        decode=decode,
        tile=tile,
        untile=untile,
        product=product,
        tile_block=tile_block,
        row_block=row_block,
        pattern=pattern,
        unpacked=Unpacked(tile_block_bytes=TILE_BLOCK_BYTES, unpack=unpack),
    )
