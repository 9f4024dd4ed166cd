"""IQ2_XS: 8 weights are one of 512 entries and 7 signs, 16 share a scale of 4 bits. 2.3125 bits.

Source: `block_iq2_xs` and `iq2xs_grid` of ggml-common.h;
`dequantize_row_iq2_xs` of ggml-quants.c.

Row block, 74 bytes, as in the file; words k of 32 bits, sub-blocks s = 0..7 of 32 weights:
    what             bits
    d                float16
    word 2s + l / 2  16(l % 2) .. + 8: entry of inputs 32s + 8l .. 32s + 8l + 7, l = 0..3
                     16(l % 2) + 9 .. + 15: signs of the first 7; of all 8 an even number is
                     negative
    word 16, 17      byte s % 4 of word 16 + s / 4: sub of inputs 32s .. 32s + 15 (low nibble), of
                     the other 16 (high)

A weight is d / 8 * (2 * sub + 1) times a number of the entry. Tiles: `headrace.sparse.codebook`.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.codebook import codebook_format, odd, put_eights, with_parity
from headrace.targets.simd import load_f16, load_i32, shl, shr, splat_f32, splat_i32, store_f32


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    d = load_f16(w, 1, 0) * splat_f32(0.125)
    for half in range(2):
        subs = load_i32(w + (32 + 64 * 16 + 64 * half), 1, 0)
        for quarter in range(4):
            s = 4 * half + quarter
            store_f32(out + 128 * s, d * odd(subs & splat_i32(15)), 0)
            store_f32(out + (64 + 128 * s), d * odd(shr(subs, 4) & splat_i32(15)), 0)
            subs = shr(subs, 8)
            a = load_i32(w + (32 + 128 * s), 1, 0)
            b = load_i32(w + (96 + 128 * s), 1, 0)
            low = (shr(a, 9) & splat_i32(0x7F)) | (shr(a, 17) & splat_i32(0x7F00))
            high = (shl(b, 7) & splat_i32(0x7F0000)) | (shr(b, 1) & splat_i32(0x7F000000))
            evens = (a & splat_i32(0x1FF)) | shl(b & splat_i32(0x1FF), 16)
            odds = (shr(a, 16) & splat_i32(0x1FF)) | (b & splat_i32(0x1FF0000))
            put_eights(out + (1024 + 512 * s), table, evens, odds, with_parity(low | high), 512)


FORMAT = codebook_format("IQ2_XS", n_words=18, n_scales=16, unpack=unpack)
