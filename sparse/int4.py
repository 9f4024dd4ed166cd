"""4-bit integers with a scale a group of 16, 32, 64 or 128 weights: `i4_g32`, `i4a_g32` and so on.

Symmetric, a weight is `d * (code - 8)`; asymmetric (`i4a`), it is `d * (code - 8 - z / 8)`, where z
says in eighths of a step how far from code 8 zero lies. z takes 8 bits, not the 4 of a zero point
that is itself a code: eighths cut the noise of normal weights by up to 1 dB (a whole step moves
both ends of the range by up to half of one), a byte is read without unpacking, and codes from -8 to
23 as zero also serve groups that lie on one side of it. Bits a weight, by group:

    16: 5 and 5.5    32: 4.5 and 4.75    64: 4.25 and 4.375    128: 4.125 and 4.1875

Row block (raw) of 32 weights, or of a group if that is more:
    field   bytes                   what
    d       2 a group               float16
    z       1 a group               int8; asymmetric only
    qs      16 for each 32 inputs   as in Q4_0: byte b = code of input b | code of input 16 + b;
                                    for groups of 16, as in NVFP4: 8 bytes for each, byte b = code
                                    of input b | code of input 8 + b

Tile block: 16 times d of the first group, then of the second if there is one; z likewise; then qs
of 16 rows in runs of 4 bytes. Groups of 32 are Q4_0's bytes, with scales that were searched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.block_grid import scaled_grid
from headrace.sparse.format import (
    TILE_ROWS,
    Bytes,
    Floats,
    Format,
    as_rows,
    byte_blocks,
    deinterleave,
    half_bytes,
    halves,
    interleave,
    pack_nibbles,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.grid import Grid
from headrace.sparse.int4_search import search
from headrace.sparse.interleaving import interleave_words, load_eights
from headrace.targets.simd import (
    and_u8,
    dot8,
    dot16,
    dot_init,
    dot_result,
    f32,
    fma,
    fma_outer,
    get_f16,
    get_i8,
    get_u8,
    get_u16,
    load_f16,
    load_i8_i32,
    load_q8,
    outer,
    put_f32,
    put_u8,
    put_u16,
    q8_f32,
    q8_i32,
    q8_shifted,
    repeat,
    shr_u8,
    splat_f32,
    splat_i32,
    to_f32,
)

GROUPS = (16, 32, 64, 128)


def _minus_zero(w: Any, d: Any, tiles: Any, stride: Any) -> Any:
    """The weight of code 0, negated: d * (8 + z / 8)."""
    z = to_f32(load_i8_i32(w, tiles, stride))
    return d * fma(z, splat_f32(0.125), splat_f32(8.0))


def _product_of_16(asymmetric: bool, codes_at: int) -> Any:
    def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
        """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
        entry = load_q8(x, tokens)
        xs = q8_f32(entry, 32)
        if asymmetric:
            low = dot_init(repeat(splat_i32(0), tokens), tiles)
            high = dot_init(repeat(splat_i32(0), tokens), tiles)
        else:
            first = q8_shifted(entry, 44, 3)
            low = dot_init(first, tiles)
            high = dot_init(q8_shifted(entry, 40, 3) - first, tiles)
        v = load_eights(w + codes_at, tiles, stride)
        low = dot8(low, and_u8(v, 15), entry, 0, 4)
        low = dot8(low, shr_u8(v, 4), entry, 8, 4)
        v = load_eights(w + (codes_at + 128), tiles, stride)
        high = dot8(high, and_u8(v, 15), entry, 16, 4)
        high = dot8(high, shr_u8(v, 4), entry, 24, 4)
        d = load_f16(w, tiles, stride)
        acc = fma(outer(d, xs), to_f32(dot_result(low, 4)), acc)
        d2 = load_f16(w + 32, tiles, stride)
        acc = fma(outer(d2, xs), to_f32(dot_result(high, 4)), acc)
        if asymmetric:
            less = q8_i32(entry, 44)  # minus the sums of codes
            acc = fma_outer(_minus_zero(w + 64, d, tiles, stride), xs * to_f32(less), acc)
            rest = xs * to_f32(q8_i32(entry, 40) - less)
            acc = fma_outer(_minus_zero(w + 80, d2, tiles, stride), rest, acc)
        return acc

    return product


def _product(asymmetric: bool, codes_at: int, chunks: int) -> Any:
    def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
        """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
        d = load_f16(w, tiles, stride)
        if asymmetric:
            zero = splat_f32(0.0) - _minus_zero(w + 32, d, tiles, stride)
        for c in range(chunks):
            entry = load_q8(x + c * (48 * group), tokens)
            codes = w + (codes_at + 256 * c)
            if asymmetric:
                total = dot_init(repeat(splat_i32(0), tokens), tiles)
            else:
                total = dot_init(q8_shifted(entry, 40, 3), tiles)
            v = load_eights(codes, tiles, stride)
            total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 0, 4)
            v = load_eights(codes + 128, tiles, stride)
            total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 8, 4)
            scale = outer(d, q8_f32(entry, 32))
            acc = fma(scale, to_f32(dot_result(total, 4)), acc)
            if asymmetric:
                acc = fma_outer(zero, q8_f32(entry, 36), acc)
        return acc

    return product


def make(group: int, asymmetric: bool) -> Format:
    """The format of groups of `group` weights, with a zero point each if `asymmetric`."""
    block = max(32, group)
    n_groups = block // group
    zeros = n_groups if asymmetric else 0
    codes_at = 2 * n_groups + zeros
    block_bytes = codes_at + block // 2
    runs = ((2 * n_groups, 2), *([(zeros, 1)] if zeros else []), (block // 2, 4))
    half = min(group, 32) // 2  # inputs between the two codes of a byte
    tiled_zeros, tiled_codes = TILE_ROWS * 2 * n_groups, TILE_ROWS * codes_at

    def encode(x: Floats) -> Bytes:
        """Quantise to nearest with searched scales; see `headrace.sparse.int4_search`."""
        blocks = weight_blocks(x, block)
        shape = blocks.shape[:2]
        d, z, codes = search(blocks.reshape(-1, group), asymmetric)
        fields = [half_bytes(d.reshape(*shape, n_groups))]
        if asymmetric:
            fields.append(z.reshape(*shape, n_groups).view(np.uint8))
        fields.append(pack_nibbles(codes.reshape(*shape, -1, 2 * half)).reshape(*shape, -1))
        return as_rows(np.concatenate(fields, axis=-1))

    @np.errstate(all="ignore")
    def decode(raw: Bytes) -> Floats:
        """Give the float32 weights."""
        blocks = byte_blocks(raw, block_bytes)
        shape = blocks.shape[:2]
        packed = blocks[..., codes_at:].reshape(*shape, block // 2 // half, half)
        eighths = 8 * (unpack_nibbles(packed).astype(np.int32) - 8)
        eighths = eighths.reshape(*shape, n_groups, group)
        if asymmetric:
            eighths -= blocks[..., 2 * n_groups : codes_at, None].view(np.int8)
        d = halves(blocks[..., : 2 * n_groups])[..., None] * np.float32(0.125)
        return as_rows((d * eighths.astype(np.float32)).reshape(*shape, block))

    def tile(raw: Bytes) -> Bytes:
        """Interleave 16 rows: the tile block above."""
        return interleave(byte_blocks(raw, block_bytes), runs)

    def untile(tiled: Bytes, rows: int) -> Bytes:
        """Give back the raw bytes of the first `rows` rows."""
        return as_rows(deinterleave(tiled, rows, runs))

    def put(blocks: Bytes, codes: Bytes) -> None:
        shape = blocks.shape[:2]
        packed = pack_nibbles(codes.reshape(*shape, -1, 2 * half))
        blocks[..., codes_at:] = packed.reshape(*shape, -1)

    def put_codes(raw: Bytes, codes: Bytes) -> Bytes:
        blocks = byte_blocks(raw, block_bytes).copy()
        put(blocks, codes.reshape(*blocks.shape[:2], block))
        return as_rows(blocks)

    def scales(raw: Bytes) -> tuple[Floats, Floats]:
        blocks = byte_blocks(raw, block_bytes)
        d = as_rows(halves(blocks[..., : 2 * n_groups]))
        z = as_rows(blocks[..., 2 * n_groups : codes_at].view(np.int8)).astype(np.float32)
        return d, -d * (8 + z / 8)

    grid = scaled_grid(
        block, block_bytes, range(-8, 8), put, group=group, field=slice(2 * n_groups)
    )
    if asymmetric:  # zeros are searched without heed to importance
        levels = tuple(map(float, range(16)))
        grid = Grid(
            group=group, levels=levels, fit=lambda x, _: encode(x), scales=scales, put=put_codes
        )

    def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
        """One block of 16 raw rows to a tile block."""
        for row in range(16):
            at = src + row * row_bytes
            for g in range(n_groups):
                put_u16(dst + (32 * g + row * 2), get_u16(at + 2 * g))
            for g in range(zeros):
                put_u8(dst + (tiled_zeros + 16 * g + row), get_u8(at + (2 * n_groups + g)))
        interleave_words(src + codes_at, row_bytes, dst + tiled_codes, block // 8)

    def row_block(w: Any, lane: Any, out: Any) -> None:
        """The weights of row `lane` of a tile block."""
        for s in range(block // 2 // half):
            g = s * n_groups // (block // 2 // half)
            d = get_f16(w + (32 * g + lane * 2)) * f32(0.125)
            zero = 64 + (get_i8(w + (tiled_zeros + 16 * g + lane)) if asymmetric else 0)
            for i in range(half):
                b = s * half + i
                both = get_u8(w + (tiled_codes + b // 4 * 64 + lane * 4 + b % 4))
                to = out + (2 * s * half + i) * 4
                put_f32(to, d * f32(8 * (both & 15) - zero))
                put_f32(to + half * 4, d * f32(8 * (both >> 4) - zero))

    return Format(
        name=f"i4a_g{group}" if asymmetric else f"i4_g{group}",
        modules=("int4",),
        block=block,
        block_bytes=block_bytes,
        tile_block_bytes=TILE_ROWS * block_bytes,
        activation="q8",
        encode=encode,
        decode=decode,
        tile=tile,
        untile=untile,
        product=_product_of_16(asymmetric, tiled_codes)
        if group == 16
        else _product(asymmetric, tiled_codes, block // 32),
        tile_block=tile_block,
        row_block=row_block,
        grid=grid,
    )


FORMATS = tuple(make(group, asymmetric) for group in GROUPS for asymmetric in (False, True))
