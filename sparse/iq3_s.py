"""IQ3_S: 4 weights are one of 512 entries and 4 signs, 32 share a scale of 4 bits. 3.4375 bits.

Source: `block_iq3_s` and `iq3s_grid` of ggml-common.h;
`dequantize_row_iq3_s` of ggml-quants.c.

Row block, 110 bytes, as in the file; words k of 32 bits, sub-blocks s = 0..7 of 32 weights:
    what            bits
    d               float16
    word 2s, 2s + 1 8l..8l+7: bits 0..7 of the entry of inputs 32s + 4l .., l = 0..7 in both
    word 16, 17     byte s % 4 of word 16 + s / 4, bit l: bit 8 of that entry
    word 18 + s     bit i: sign of input 32s + i
    word 26         4s..4s+3: sub of sub-block s

A weight is d * (2 * sub + 1) times a number of the entry. Tiles: `headrace.sparse.codebook`.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.codebook import codebook_format, odd, put_fours
from headrace.targets.simd import load_f16, load_i32, shl, shr, splat_i32, store_f32


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    d = load_f16(w, 1, 0)
    low = splat_i32(0xFF00FF)
    subs = load_i32(w + (32 + 64 * 26), 1, 0)
    for half in range(2):
        high = load_i32(w + (32 + 64 * 16 + 64 * half), 1, 0)
        for quarter in range(4):
            s = 4 * half + quarter
            store_f32(out + 64 * s, d * odd(subs & splat_i32(15)), 0)
            subs = shr(subs, 4)
            signs = load_i32(w + (32 + 64 * 18 + 64 * s), 1, 0)
            for pair in range(2):
                index = load_i32(w + (32 + 128 * s + 64 * pair), 1, 0)
                # Bits 0 and 2 of `high` to bits 8 and 24, then bits 1 and 3.
                ninth = (shl(high, 8) & splat_i32(0x100)) | (shl(high, 22) & splat_i32(0x1000000))
                evens = (index & low) | ninth
                ninth = (shl(high, 7) & splat_i32(0x100)) | (shl(high, 21) & splat_i32(0x1000000))
                odds = (shr(index, 8) & low) | ninth
                to = out + (512 + 512 * s + 256 * pair)
                put_fours(to, table, evens, odds, signs, 512)
                signs = shr(signs, 16)
                high = shr(high, 4)


FORMAT = codebook_format("IQ3_S", n_words=27, n_scales=8, unpack=unpack)
