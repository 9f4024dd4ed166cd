"""IQ2_S: 8 weights are one of 1024 entries and 8 signs, 16 share a scale of 4 bits. 2.5625 bits.

Source: `block_iq2_s` and `iq2s_grid` of ggml-common.h;
`dequantize_row_iq2_s` of ggml-quants.c.

Row block, 82 bytes, as in the file; words k of 32 bits, sub-blocks s = 0..7 of 32 weights:
    what          bits
    d             float16
    word s        8l..8l+7: bits 0..7 of the entry of inputs 32s + 8l .. 32s + 8l + 7, l = 0..3
    word 8 + s    bit i: sign of input 32s + i
    word 16, 17   byte s % 4 of word 16 + s / 4, bits 2l..2l+1: bits 8..9 of that entry
    word 18, 19   byte s % 4 of word 18 + s / 4: sub of inputs 32s .. 32s + 15 (low nibble), of the
                  other 16 (high)

A weight is d / 8 * (2 * sub + 1) times a number of the entry. Tiles: `headrace.sparse.codebook`.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.codebook import codebook_format, odd, put_eights
from headrace.targets.simd import load_f16, load_i32, shl, shr, splat_f32, splat_i32, store_f32


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    d = load_f16(w, 1, 0) * splat_f32(0.125)
    for half in range(2):
        bits = load_i32(w + (32 + 64 * 16 + 64 * half), 1, 0)
        subs = load_i32(w + (32 + 64 * 18 + 64 * half), 1, 0)
        for quarter in range(4):
            s = 4 * half + quarter
            store_f32(out + 128 * s, d * odd(subs & splat_i32(15)), 0)
            store_f32(out + (64 + 128 * s), d * odd(shr(subs, 4) & splat_i32(15)), 0)
            subs = shr(subs, 8)
            index = load_i32(w + (32 + 64 * s), 1, 0)
            signs = load_i32(w + (32 + 64 * 8 + 64 * s), 1, 0)
            high = (shl(bits, 8) & splat_i32(0x300)) | (shl(bits, 20) & splat_i32(0x3000000))
            evens = (index & splat_i32(0xFF00FF)) | high
            high = (shl(bits, 6) & splat_i32(0x300)) | (shl(bits, 18) & splat_i32(0x3000000))
            odds = (shr(index, 8) & splat_i32(0xFF00FF)) | high
            bits = shr(bits, 8)
            put_eights(out + (1024 + 512 * s), table, evens, odds, signs, 1024)


FORMAT = codebook_format("IQ2_S", n_words=20, n_scales=16, unpack=unpack)
