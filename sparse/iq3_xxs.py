"""IQ3_XXS: 4 weights are one of 256 entries and 3.5 signs, 32 share a scale of 4 bits. 3.0625 bits.

Source: `block_iq3_xxs` and `iq3xxs_grid` of ggml-common.h;
`dequantize_row_iq3_xxs` of ggml-quants.c.

Row block, 98 bytes, as in the file; words k of 32 bits, sub-blocks s = 0..7 of 32 weights:
    what            bits
    d               float16
    word 2s, 2s + 1 8l..8l+7: entry of inputs 32s + 4l .., l = 0..7 in both
    word 16 + s     7l..7l+6: signs of inputs 32s + 8l .. 32s + 8l + 6, l = 0..3; of all 8 an even
                    number is negative
                    28..31: sub of sub-block s

A weight is d / 4 * (2 * sub + 1) times a number of the entry. Tiles: `headrace.sparse.codebook`.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.codebook import codebook_format, four_signs, odd, put_fours
from headrace.targets.simd import load_f16, load_i32, shr, splat_f32, splat_i32, store_f32


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    d = load_f16(w, 1, 0) * splat_f32(0.25)
    low = splat_i32(0xFF00FF)
    for s in range(8):
        last = load_i32(w + (32 + 64 * 16 + 64 * s), 1, 0)
        store_f32(out + 64 * s, d * odd(shr(last, 28)), 0)
        signs = four_signs(last)
        to = out + (512 + 512 * s)
        index = load_i32(w + (32 + 128 * s), 1, 0)
        put_fours(to, table, index & low, shr(index, 8) & low, signs, 256)
        index = load_i32(w + (96 + 128 * s), 1, 0)
        put_fours(to + 256, table, index & low, shr(index, 8) & low, shr(signs, 16), 256)


FORMAT = codebook_format("IQ3_XXS", n_words=24, n_scales=8, unpack=unpack)
