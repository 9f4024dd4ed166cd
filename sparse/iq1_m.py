"""IQ1_M: 8 weights are one of 2048 ternary entries and a shift, 16 share a scale. 1.75 bits.

Source: `block_iq1_m` and `iq1s_grid` of ggml-common.h;
`dequantize_row_iq1_m` of ggml-quants.c.

Row block, 56 bytes, as in the file; words k of 32 bits, sub-blocks s = 0..7 of 32 weights:
    what            bits
    word s          8l..8l+7: bits 0..7 of the entry of inputs 32s + 8l .. 32s + 8l + 7, l = 0..3
    word 8 + s / 2  its half s % 2, bits 4l..4l+2: bits 8..10 of that entry
                    bit 4l + 3: the entry's shift is -1, else 1
    word 12, 13     half k % 2 of word 12 + k / 2, k = s / 2, bits 6(s % 2) .. + 2: sub of inputs
                    32s .. 32s + 15, the next 3 bits: of the other 16
                    the same half, bits 12..15: bits 4k..4k+3 of d, a float16

A weight is d / 8 * (2 * sub + 1) * (8 * number + shift), with numbers -1, 0 and 1. Tiles:
`headrace.sparse.codebook`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.codebook import codebook_format, odd, put_shifted, shift_of
from headrace.sparse.format import Bytes
from headrace.targets.simd import (
    load_f16,
    load_i32,
    shl,
    shr,
    splat_f32,
    splat_i32,
    store_f32,
    store_i16,
)


def _put_sub_block(w: Any, table: Any, out: Any, s: Any, d: Any, subs: Any, bits: Any) -> None:
    """Sub-block s, whose scales and upper bits of indices lie lowest in `subs` and `bits`."""
    store_f32(out + 128 * s, d * odd(subs & splat_i32(7)), 0)
    store_f32(out + (64 + 128 * s), d * odd(shr(subs, 3) & splat_i32(7)), 0)
    index = load_i32(w + 64 * s, 1, 0)
    high = (shl(bits, 8) & splat_i32(0x700)) | (shl(bits, 16) & splat_i32(0x7000000))
    evens = (index & splat_i32(0xFF00FF)) | high
    high = (shl(bits, 4) & splat_i32(0x700)) | (shl(bits, 12) & splat_i32(0x7000000))
    odds = (shr(index, 8) & splat_i32(0xFF00FF)) | high
    to = out + (1024 + 512 * s)
    put_shifted(to, table, evens, shift_of(bits, 3), shift_of(bits, 11), 2048)
    put_shifted(to + 128, table, odds, shift_of(bits, 7), shift_of(bits, 15), 2048)


def unpack(w: Any, table: Any, out: Any) -> None:
    """A tile block in the plain form."""
    a = load_i32(w + 64 * 12, 1, 0)
    b = load_i32(w + 64 * 13, 1, 0)
    low = (shr(a, 12) & splat_i32(0xF)) | (shr(a, 24) & splat_i32(0xF0))
    high = (shr(b, 4) & splat_i32(0xF00)) | (shr(b, 16) & splat_i32(0xF000))
    store_i16(out, low | high, 0)
    d = load_f16(out, 1, 0) * splat_f32(0.125)
    for word in range(2):
        subs = load_i32(w + (64 * 12 + 64 * word), 1, 0)
        for pair in range(2):
            k = 2 * word + pair
            bits = load_i32(w + (64 * 8 + 64 * k), 1, 0)
            _put_sub_block(w, table, out, 2 * k, d, subs, bits)
            _put_sub_block(w, table, out, 2 * k + 1, d, shr(subs, 6), shr(bits, 16))
            subs = shr(subs, 16)


def _set_scales(blocks: Bytes, d: Bytes) -> None:
    words = blocks[..., 48:56].copy().view(np.uint16)
    nibbles = d.view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & np.uint16(15)
    blocks[..., 48:56] = (words & np.uint16(0x0FFF) | nibbles << np.uint16(12)).view(np.uint8)


FORMAT = codebook_format(
    "IQ1_M", n_words=14, n_scales=16, unpack=unpack, table="IQ1_S", times=8, scale_of=_set_scales
)
