"""1, 2 and 3 bits by bit planes, a scale for 64 weights: `i1_g64`, `i2_g64`, `i3_g64`.

A weight is `d * (2 * code - (2^bits - 1))`: d times 2^p for each set bit p of its code, less 2^p
for each that is not. So the sum over inputs is one of signs for each plane, and those of 4 inputs
choose from 16 sums that are made once for a token (`headrace.sparse.plane_tables`, from T-MAC,
https://arxiv.org/abs/2407.00088). Products of more tokens unpack codes 0, 2, .. of INT4's range.
1.25, 2.25 and 3.25 bits.

Row block (raw) of 64 weights:
    bytes                     what
    0..1                      d, float16
    2 + 4 (c * bits + p) + q  bit b: bit p of the code of input 32c + 4b + q

Tile block: d of 16 rows, then each byte of 16 rows in turn.
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
    halves,
    interleave,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_bytes, interleave_halves
from headrace.targets.simd import (
    and_u8,
    copy_runs,
    dot8,
    dot_init,
    dot_result,
    eights,
    f32,
    fma,
    get_f16,
    get_u8,
    load_columns,
    load_f16,
    load_q8,
    outer,
    put_f32,
    q8_f32,
    q8_i32,
    q8_shifted,
    shl_u8,
    shr_u8,
    to_f32,
)

BLOCK = 64
CODES_AT = 2 * TILE_ROWS  # in a tile block


def pack_planes(codes: Bytes, bits: int) -> Bytes:
    """Codes [rows, n_blocks, 64] as the bytes of their planes [rows, n_blocks, 8 * bits]."""
    by_byte = (
        codes.reshape(*codes.shape[:2], 2, 1, 8, 4)
        >> np.arange(bits, dtype=np.uint8)[:, None, None]
    )
    packed = np.packbits(by_byte & 1, axis=-2, bitorder="little")
    return packed.reshape(*codes.shape[:2], 8 * bits)


def unpack_planes(packed: Bytes, bits: int) -> Bytes:
    """Undo `pack_planes`."""
    shape = packed.shape[:2]
    planes = np.unpackbits(packed.reshape(*shape, 2, bits, 1, 4), axis=-2, bitorder="little")
    weights = (1 << np.arange(bits, dtype=np.uint8))[:, None, None]
    codes: Bytes = (planes * weights).sum(axis=3, dtype=np.uint8).reshape(*shape, BLOCK)
    return codes


def _shifted(by: int, mask: int) -> Any:
    """The bits of `mask` of bytes shifted left by `by`, right where it is negative."""
    if by > 0:
        return lambda v: and_u8(shl_u8(v, by), mask)
    right = -by
    return lambda v: and_u8(shr_u8(v, right), mask)


def _four_codes(bits: int, step: int) -> Any:
    """Twice the codes of 4 inputs, those of bit `step`, of columns `planes` (a tuple)."""
    first = _shifted(1 - step, 2)
    if bits == 1:
        return lambda v0, v1, v2: first(v0)
    second = _shifted(2 - step, 4)
    if bits == 2:
        return lambda v0, v1, v2: first(v0) | second(v1)
    third = _shifted(3 - step, 8)
    return lambda v0, v1, v2: first(v0) | second(v1) | third(v2)


def _eight_codes(bits: int, step: int) -> Any:
    """Twice the codes of 8 inputs, as `dot8` takes them."""
    low, high = _four_codes(bits, step), _four_codes(bits, step + 1)
    return lambda v0, v1, v2: eights(low(v0, v1, v2), high(v0, v1, v2))


def _product(bits: int) -> Any:
    first, second, third, fourth = (_eight_codes(bits, step) for step in (0, 2, 4, 6))
    # Of the first plane where there are fewer.
    at1, at2 = 64 * min(1, bits - 1), 64 * min(2, bits - 1)
    chunk = 64 * bits

    def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
        """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
        d = load_f16(w, tiles, stride)
        for c in range(2):
            entry = load_q8(x + c * (48 * group), tokens)
            codes = w + (CODES_AT + chunk * c)
            v0 = load_columns(codes, tiles, stride)
            v1 = load_columns(codes + at1, tiles, stride)
            v2 = load_columns(codes + at2, tiles, stride)
            total = dot_init(q8_shifted(entry, 40, bits) - q8_i32(entry, 40), tiles)
            total = dot8(total, first(v0, v1, v2), entry, 0, 4)
            total = dot8(total, second(v0, v1, v2), entry, 8, 4)
            total = dot8(total, third(v0, v1, v2), entry, 16, 4)
            total = dot8(total, fourth(v0, v1, v2), entry, 24, 4)
            acc = fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, 4)), acc)
        return acc

    return product


def make(bits: int) -> Format:
    """The format of so many planes."""
    block_bytes = 2 + 8 * bits
    runs = ((2, 2), (8 * bits, 1))
    top = (1 << bits) - 1

    def put(blocks: Bytes, codes: Bytes) -> None:
        blocks[..., 2:] = pack_planes(codes, bits)

    grid = scaled_grid(BLOCK, block_bytes, range(-top, top + 1, 2), put)

    def encode(x: Floats) -> Bytes:
        """Quantise to nearest with searched scales."""
        weight_blocks(x, BLOCK)  # refuses rows of another length
        return grid.round(x, grid.fit(x, None))

    @np.errstate(all="ignore")
    def decode(raw: Bytes) -> Floats:
        """Give the float32 weights."""
        blocks = byte_blocks(raw, block_bytes)
        levels = 2 * unpack_planes(blocks[..., 2:], bits).astype(np.float32) - top
        return as_rows(halves(blocks[..., :2]) * levels)

    def tile(raw: Bytes) -> Bytes:
        """Interleave 16 rows: the tile block above."""
        return interleave(byte_blocks(raw, block_bytes), runs)

    def untile(tiled: Bytes, rows: int) -> Bytes:
        """Give back the raw bytes of the first `rows` rows."""
        return as_rows(deinterleave(tiled, rows, runs))

    def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
        """One block of 16 raw rows to a tile block."""
        interleave_halves(src, row_bytes, dst)
        for k in range(bits // 2):
            copy_runs(dst + (CODES_AT + 256 * k), src + (2 + 16 * k), row_bytes, 1)
        for k in range(bits // 2 * 16, bits * 8):
            interleave_bytes(src + (2 + k), row_bytes, dst + (CODES_AT + 16 * k))

    def row_block(w: Any, lane: Any, out: Any) -> None:
        """The 64 weights of row `lane` of a tile block."""
        d = get_f16(w + lane * 2)
        for i in range(BLOCK):
            level = -top
            for p in range(bits):
                byte = get_u8(w + (CODES_AT + 64 * (i // 32 * bits + p) + i % 4 * 16 + lane))
                level += ((byte >> (i % 32 // 4)) & 1) << (p + 1)
            put_f32(out + i * 4, d * f32(level))

    return Format(
        name=f"i{bits}_g64",
        modules=("int_planes", "plane_tables"),
        block=BLOCK,
        block_bytes=block_bytes,
        tile_block_bytes=TILE_ROWS * block_bytes,
        activation="tables",
        planes=bits,
        encode=encode,
        decode=decode,
        tile=tile,
        untile=untile,
        product=_product(bits),
        tile_block=tile_block,
        row_block=row_block,
        grid=grid,
    )


FORMATS = tuple(make(bits) for bits in (1, 2, 3))
