"""IQ2_XXS: 8 weights are one of 256 entries and 7 signs, 32 share a scale of 4 bits. 2.0625 bits.

Source: `block_iq2_xxs` and `iq2xxs_grid` of ggml-common.h;
`dequantize_row_iq2_xxs` of ggml-quants.c.

Row block, 66 bytes, as in the file; words k of 32 bits, sub-blocks s = 0..7 of 32 weights:
    what        bits
    d           float16
    word 2s     8l..8l+7: entry of inputs 32s + 8l .. 32s + 8l + 7, l = 0..3
    word 2s + 1 7l..7l+6: signs of the first 7 of them; of all 8 an even number is negative
                28..31: sub of sub-block s

A weight is d / 8 * (2 * sub + 1) times a number of the entry. Tiles: `headrace.sparse.codebook`.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.codebook import codebook_format, four_signs, odd, put_eights
from headrace.targets.simd import load_f16, load_i32, shr, splat_f32, splat_i32, store_f32


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    d = load_f16(w, 1, 0) * splat_f32(0.125)
    for s in range(8):
        index = load_i32(w + (32 + 128 * s), 1, 0)
        last = load_i32(w + (96 + 128 * s), 1, 0)
        store_f32(out + 64 * s, d * odd(shr(last, 28)), 0)
        evens = index & splat_i32(0xFF00FF)
        odds = shr(index, 8) & splat_i32(0xFF00FF)
        put_eights(out + (512 + 512 * s), table, evens, odds, four_signs(last), 256)


FORMAT = codebook_format("IQ2_XXS", n_words=16, n_scales=8, unpack=unpack)
