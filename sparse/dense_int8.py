"""The plain form of sparse blocks of 32 weights, made dense in the cache: what is multiplied.

A tile block of it, 576 bytes: the scales of 16 rows as float32, then bytes code + 8 of all 32
inputs, 4 of each row side by side; a weight is scale * code, code -8..7. See `format.Unpacked`.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.interleaving import load_eights
from headrace.targets.simd import (
    dot8,
    dot_init,
    dot_result,
    f32,
    fma,
    get_f32,
    get_u8,
    load_f32,
    load_q8,
    outer,
    put_f32,
    q8_f32,
    q8_shifted,
    to_f32,
)

BLOCK = 32
TILE_BLOCK_BYTES = 64 + 16 * BLOCK


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
