"""4-bit floats of any split with a float16 scale a group: `e2m1_g16`, `e2m1_g128`, `e1m2_g128` ..

A code is a sign and a magnitude, as in the OCP formats; what the 8 magnitudes of a split of E bits
of exponent and M of mantissa are, in units of the smallest, is in `MAGNITUDES`. A weight is d times
that.

`e2m1_g16` (5 bits) is what NVFP4 with a float32 scale for the tensor becomes: the E4M3 scale of 16
weights times it, as a float16. Groups of 128 (4.125 bits) are the weights of LLM-FP4
(`headrace.sparse.llm_fp4`): all groups of a row may then have one scale, whatever its bias is.

Row block (raw) of 32 weights, or of 128:
    field   bytes                   what
    d       2 a group               float16
    qs      16 for each 32 inputs   as in INT4 (`headrace.sparse.int4`): byte b = code of input b |
                                    code of input 16 + b; in groups of 16, 8 bytes for each, byte b
                                    = code of input b | code of input 8 + b

Tile block: 16 times d of the first group, then of the second if there is one; then qs of 16 rows in
runs of 4 bytes.
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
from headrace.sparse.interleaving import interleave_words, load_eights
from headrace.sparse.lookup import table_value
from headrace.targets.simd import (
    SMALL,
    dot8,
    dot16,
    dot_init,
    dot_result,
    dot_start,
    f32,
    fma,
    get_f16,
    get_u8,
    get_u16,
    load_f16,
    load_q8,
    lookup16,
    outer,
    put_f32,
    put_u16,
    q8_f32,
    table_words,
    to_f32,
)

MAGNITUDES = {
    "e2m1": (0, 1, 2, 3, 4, 6, 8, 12),
    "e1m2": (0, 1, 2, 3, 4, 5, 6, 7),
    "e3m0": (0, 1, 2, 4, 8, 16, 32, 64),
}


def values_of(split: str) -> np.ndarray:
    """What the 16 codes stand for, int8."""
    magnitudes = np.array(MAGNITUDES[split], np.int8)
    return np.concatenate([magnitudes, -magnitudes])


def _product_of_16(low: int, high: int, bits: int) -> Any:
    def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
        """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
        entry = load_q8(x, tokens)
        xs = q8_f32(entry, 32)
        start = dot_start(entry, 44, bits)
        first = dot_init(start, tiles)
        second = dot_init(dot_start(entry, 40, bits) - start, tiles)
        v = load_eights(w + 64, tiles, stride)
        first = dot8(first, lookup16(v, 0, low, high, bits), entry, 0, bits)
        first = dot8(first, lookup16(v, 4, low, high, bits), entry, 8, bits)
        v = load_eights(w + 192, tiles, stride)
        second = dot8(second, lookup16(v, 0, low, high, bits), entry, 16, bits)
        second = dot8(second, lookup16(v, 4, low, high, bits), entry, 24, bits)
        acc = fma(outer(load_f16(w, tiles, stride), xs), to_f32(dot_result(first, bits)), acc)
        d = load_f16(w + 32, tiles, stride)
        return fma(outer(d, xs), to_f32(dot_result(second, bits)), acc)

    return product


def _product(low: int, high: int, bits: int, chunks: int) -> Any:
    def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
        """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
        d = load_f16(w, tiles, stride)
        for c in range(chunks):
            entry = load_q8(x + c * (48 * group), tokens)
            codes = w + (32 + 256 * c)
            total = dot_init(dot_start(entry, 40, bits), tiles)
            v = load_eights(codes, tiles, stride)
            first, second = lookup16(v, 0, low, high, bits), lookup16(v, 4, low, high, bits)
            total = dot16(total, first, second, entry, 0, bits)
            v = load_eights(codes + 128, tiles, stride)
            first, second = lookup16(v, 0, low, high, bits), lookup16(v, 4, low, high, bits)
            total = dot16(total, first, second, entry, 8, bits)
            acc = fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, bits)), acc)
        return acc

    return product


def pack(codes: Bytes, d: Floats, group: int) -> Bytes:
    """Raw rows of codes [rows, n] and scales [rows, n / group]."""
    rows, n = codes.shape
    block = max(32, group)
    shape = rows, n // block
    half = min(group, 32)
    packed = pack_nibbles(codes.reshape(*shape, -1, half)).reshape(*shape, block // 2)
    return as_rows(np.concatenate([half_bytes(d.reshape(*shape, -1)), packed], axis=-1))


def make(split: str, group: int) -> Format:
    """The format of groups of 16 or 128 weights of a split."""
    values = values_of(split)
    low, high = table_words(values.tolist())
    bits = SMALL if values.max() <= 15 else 8
    block = max(32, group)
    n_groups = block // group
    codes_at = 2 * n_groups
    block_bytes = codes_at + block // 2
    runs = ((codes_at, 2), (block // 2, 4))
    half = min(group, 32) // 2  # inputs between the two codes of a byte
    tiled_codes = TILE_ROWS * codes_at

    def put(blocks: Bytes, codes: Bytes) -> None:
        packed = pack_nibbles(codes.reshape(*blocks.shape[:2], -1, 2 * half))
        blocks[..., codes_at:] = packed.reshape(*blocks.shape[:2], -1)

    grid = scaled_grid(
        block, block_bytes, values.tolist(), put, group=group, field=slice(0, codes_at)
    )

    def encode(x: Floats) -> Bytes:
        """Quantise to nearest with searched scales."""
        weight_blocks(x, block)  # refuses rows of another length
        return grid.round(x, grid.fit(x, None))

    @np.errstate(all="ignore")
    def decode(raw: Bytes) -> Floats:
        """Give the float32 weights."""
        blocks = byte_blocks(raw, block_bytes)
        shape = blocks.shape[:2]
        packed = blocks[..., codes_at:].reshape(*shape, block // 2 // half, half)
        known = values[unpack_nibbles(packed)].reshape(*shape, n_groups, group)
        d = halves(blocks[..., :codes_at])[..., None]
        return as_rows((d * known.astype(np.float32)).reshape(*shape, block))

    def tile(raw: Bytes) -> Bytes:
        """Interleave 16 rows: the tile block above."""
        return interleave(byte_blocks(raw, block_bytes), runs)

    def untile(tiled: Bytes, rows: int) -> Bytes:
        """Give back the raw bytes of the first `rows` rows."""
        return as_rows(deinterleave(tiled, rows, runs))

    def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
        """One block of 16 raw rows to a tile block."""
        for row in range(16):
            for g in range(n_groups):
                put_u16(dst + (32 * g + row * 2), get_u16(src + (row * row_bytes + 2 * g)))
        interleave_words(src + codes_at, row_bytes, dst + tiled_codes, block // 8)

    def row_block(w: Any, lane: Any, out: Any) -> None:
        """The weights of row `lane` of a tile block."""
        for s in range(block // 2 // half):
            d = get_f16(w + (32 * (s * n_groups // (block // 2 // half)) + lane * 2))
            for i in range(half):
                b = s * half + i
                both = get_u8(w + (tiled_codes + b // 4 * 64 + lane * 4 + b % 4))
                to = out + (2 * s * half + i) * 4
                put_f32(to, d * f32(table_value(low, high, both & 15)))
                put_f32(to + half * 4, d * f32(table_value(low, high, both >> 4)))

    return Format(
        name=f"{split}_g{group}",
        modules=("fp4",),
        block=block,
        block_bytes=block_bytes,
        tile_block_bytes=TILE_ROWS * block_bytes,
        activation="q8",
        encode=encode,
        decode=decode,
        tile=tile,
        untile=untile,
        product=_product_of_16(low, high, bits)
        if group == 16
        else _product(low, high, bits, block // 32),
        tile_block=tile_block,
        row_block=row_block,
        grid=grid,
    )


FORMATS = (make("e2m1", 16), *(make(split, 128) for split in MAGNITUDES))
