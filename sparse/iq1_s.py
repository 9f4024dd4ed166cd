"""IQ1_S: 8 weights are one of 2048 ternary entries; 32 share a scale and a shift. 1.5625 bits.

Source: `block_iq1_s` and `iq1s_grid` of ggml-common.h;
`dequantize_row_iq1_s` of ggml-quants.c.

Row block, 50 bytes, as in the file; words k of 32 bits, sub-blocks s = 0..7 of 32 weights:
    what            bits
    d               float16
    word s          8l..8l+7: bits 0..7 of the entry of inputs 32s + 8l .. 32s + 8l + 7, l = 0..3
    word 8 + s / 2  its half s % 2, bits 3l..3l+2: bits 8..10 of that entry
                    bits 12..14: sub; bit 15: the shift is -1, else 1

A weight is d / 8 * (2 * sub + 1) * (8 * number + shift), with numbers -1, 0 and 1. Tiles:
`headrace.sparse.codebook`.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.codebook import codebook_format, odd, put_shifted, shift_of
from headrace.targets.simd import load_f16, load_i32, shl, shr, splat_f32, splat_i32, store_f32


def _put_sub_block(w: Any, table: Any, out: Any, s: Any, d: Any, bits: Any) -> None:
    """Sub-block s, whose scale, shift and upper bits of indices are the lower half of `bits`."""
    store_f32(out + 64 * s, d * odd(shr(bits, 12) & splat_i32(7)), 0)
    index = load_i32(w + (32 + 64 * s), 1, 0)
    high = (shl(bits, 8) & splat_i32(0x700)) | (shl(bits, 18) & splat_i32(0x7000000))
    evens = (index & splat_i32(0xFF00FF)) | high
    high = (shl(bits, 5) & splat_i32(0x700)) | (shl(bits, 15) & splat_i32(0x7000000))
    odds = (shr(index, 8) & splat_i32(0xFF00FF)) | high
    shift = shift_of(bits, 15)
    to = out + (512 + 512 * s)
    put_shifted(to, table, evens, shift, shift, 2048)
    put_shifted(to + 128, table, odds, shift, shift, 2048)


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    d = load_f16(w, 1, 0) * splat_f32(0.125)
    for pair in range(4):
        bits = load_i32(w + (32 + 64 * 8 + 64 * pair), 1, 0)
        _put_sub_block(w, table, out, 2 * pair, d, bits)
        _put_sub_block(w, table, out, 2 * pair + 1, d, shr(bits, 16))


FORMAT = codebook_format("IQ1_S", n_words=12, n_scales=8, unpack=unpack, times=8)
