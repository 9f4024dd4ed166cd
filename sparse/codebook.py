"""What formats share whose weights are entries of a codebook: GGML's IQ1, IQ2 and IQ3 types.

An index chooses 4 or 8 small integers at once from a table, bits beside it negate some of them,
and a weight is `d * step * (2 * sub + 1)` times one, with a float16 d for 256 weights and an
integer sub for 16 or 32. Looking up is by far the most work, and the same for every token.
So kernels bring a tile block into a plain form first, in cache (`Unpacked`), and multiply that:

    bytes                      what
    64s + 4r                   scale of sub-block s of row r, float32; s = 0..n-1, n is 8 or 16
    64n + 64k + 4r + i         signed code of input 4k + i of row r; k = 0..63

Raw blocks and tile blocks have the same bytes: a float16 d first (IQ1_M has none), then words of 32
bits. In a tile block d of row r is at 2r, and word k of row r at 32 + 64k + 4r (IQ1_M: 64k + 4r).
The tables are those of the gguf package, which also decodes the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.sparse.format import (
    Bytes,
    Floats,
    Format,
    Unpacked,
    as_rows,
    byte_blocks,
    deinterleave,
    half_bytes,
    interleave,
    weight_blocks,
)
from headrace.sparse.interleaving import interleave_halves, interleave_words, load_eights
from headrace.targets.simd import (
    bits_u8,
    copy_runs,
    dot8,
    dot_init,
    dot_result,
    dot_start,
    f32,
    fma,
    get_f32,
    get_i8,
    load_entries,
    load_f32,
    load_q8,
    negate_bytes,
    outer,
    part,
    put_f32,
    q8_f32,
    shl,
    shr,
    splat_i32,
    store_u8,
    to_f32,
)

BLOCK = 256
CODES = {8: 512, 16: 1024}  # where codes begin behind so many scales


# --- pieces of `unpack` ---------------------------------------------------------------------------


def odd(sub: Any) -> Any:
    """2 * sub + 1 of int32 lanes, as float32."""
    return to_f32(shl(sub, 1) | splat_i32(1))


def with_parity(bits: Any) -> Any:
    """Of each byte bits 0..6, and bit 7 such that an even number of them is set.

    Source: `ksigns_iq2xs` of ggml-common.h.
    """
    bits = bits & splat_i32(0x7F7F7F7F)
    odds = bits ^ shr(bits, 4)
    odds = odds ^ shr(odds, 2)
    odds = odds ^ shr(odds, 1)
    return bits | shl(odds & splat_i32(0x01010101), 7)


def four_signs(word: Any) -> Any:
    """Bits 0..27 of a word, which are 4 times 7, as 4 bytes of signs."""
    low = (word & splat_i32(0x7F)) | shl(word & splat_i32(0x3F80), 1)
    high = shl(word & splat_i32(0x1FC000), 2) | shl(word & splat_i32(0xFE00000), 3)
    return with_parity(low | high)


def put_eights(out: Any, table: Any, evens: Any, odds: Any, signs: Any, n_entries: Any) -> None:
    """Store 32 codes of each row, entries of 8 that bits of `signs` negate.

    `evens` has the indices of entries 0 and 2 in its halves, `odds` those of 1 and 3.
    """
    codes = load_entries(table, evens, 8, n_entries)
    store_u8(out, negate_bytes(part(codes, 0), signs, 0))
    store_u8(out + 64, negate_bytes(part(codes, 1), signs, 4))
    store_u8(out + 256, negate_bytes(part(codes, 2), signs, 16))
    store_u8(out + 320, negate_bytes(part(codes, 3), signs, 20))
    codes = load_entries(table, odds, 8, n_entries)
    store_u8(out + 128, negate_bytes(part(codes, 0), signs, 8))
    store_u8(out + 192, negate_bytes(part(codes, 1), signs, 12))
    store_u8(out + 384, negate_bytes(part(codes, 2), signs, 24))
    store_u8(out + 448, negate_bytes(part(codes, 3), signs, 28))


def put_fours(out: Any, table: Any, evens: Any, odds: Any, signs: Any, n_entries: Any) -> None:
    """Store 16 codes of each row, entries of 4 that bits 0..15 of `signs` negate."""
    codes = load_entries(table, evens, 4, n_entries)
    store_u8(out, negate_bytes(part(codes, 0), signs, 0))
    store_u8(out + 128, negate_bytes(part(codes, 1), signs, 8))
    codes = load_entries(table, odds, 4, n_entries)
    store_u8(out + 64, negate_bytes(part(codes, 0), signs, 4))
    store_u8(out + 192, negate_bytes(part(codes, 1), signs, 12))


def shift_of(bits: Any, place: Any) -> Any:
    """4 bytes of -1 where the bit at `place` is set, else of 1."""
    negative = splat_i32(0) - (shr(bits, place) & splat_i32(1))
    return splat_i32(0x01010101) ^ (negative & splat_i32(0xFEFEFEFE))


def put_shifted(out: Any, table: Any, index: Any, first: Any, second: Any, n_entries: Any) -> None:
    """Store entries of 8 that the halves of `index` choose, 256 bytes apart, with shifts added."""
    codes = load_entries(table, index, 8, n_entries)
    one = bits_u8(first)
    store_u8(out, part(codes, 0) + one)
    store_u8(out + 64, part(codes, 1) + one)
    other = bits_u8(second)
    store_u8(out + 256, part(codes, 2) + other)
    store_u8(out + 320, part(codes, 3) + other)


# --- products of the plain form -------------------------------------------------------------------


def _product_by_32(
    acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any
) -> Any:
    for s in range(8):
        entry = load_q8(x + s * (48 * group), tokens)
        codes = w + (512 + 512 * s)
        total = dot_init(dot_start(entry, 40, 8), tiles)
        total = dot8(total, load_eights(codes, tiles, stride), entry, 0, 8)
        total = dot8(total, load_eights(codes + 128, tiles, stride), entry, 8, 8)
        total = dot8(total, load_eights(codes + 256, tiles, stride), entry, 16, 8)
        total = dot8(total, load_eights(codes + 384, tiles, stride), entry, 24, 8)
        scale = outer(load_f32(w + 64 * s, tiles, stride), q8_f32(entry, 32))
        acc = fma(scale, to_f32(dot_result(total, 8)), acc)
    return acc


def _product_by_16(
    acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any
) -> Any:
    for s in range(8):
        entry = load_q8(x + s * (48 * group), tokens)
        codes = w + (1024 + 512 * s)
        first = dot_start(entry, 44, 8)
        low = dot_init(first, tiles)
        high = dot_init(dot_start(entry, 40, 8) - first, tiles)
        low = dot8(low, load_eights(codes, tiles, stride), entry, 0, 8)
        low = dot8(low, load_eights(codes + 128, tiles, stride), entry, 8, 8)
        high = dot8(high, load_eights(codes + 256, tiles, stride), entry, 16, 8)
        high = dot8(high, load_eights(codes + 384, tiles, stride), entry, 24, 8)
        xs = q8_f32(entry, 32)
        scale = outer(load_f32(w + 128 * s, tiles, stride), xs)
        acc = fma(scale, to_f32(dot_result(low, 8)), acc)
        scale = outer(load_f32(w + (64 + 128 * s), tiles, stride), xs)
        acc = fma(scale, to_f32(dot_result(high, 8)), acc)
    return acc


_PRODUCTS = {8: _product_by_32, 16: _product_by_16}


def _row_of(n_scales: int) -> Callable[..., None]:
    at, weights = CODES[n_scales], BLOCK // n_scales

    def row_block(w: Any, lane: Any, out: Any) -> None:
        for i in range(BLOCK):
            scale = get_f32(w + (i // weights * 64 + lane * 4))
            code = get_i8(w + (at + i // 4 * 64 + lane * 4 + i % 4))
            put_f32(out + i * 4, scale * f32(code))

    return row_block


def table_of(entries: Bytes) -> Bytes:
    """A table for `load_entries` of int8 [n, 4 or 8], of at most 16 or 4 different numbers.

    Behind the entries each is there again as a uint16: of 4 bytes code i is nibble i, of 8 bytes
    codes 0, 1, 4, 5, 2, 3, 6, 7 take 2 bits each, the first the lowest. Then come 32 bytes that a
    nibble chooses from: its number, or of its two codes the first one's; and the second one's.
    """
    n, width = entries.shape
    values, codes = np.unique(entries, return_inverse=True)
    shifts = np.array([0, 4, 8, 12] if width == 4 else [0, 2, 8, 10, 4, 6, 12, 14], np.uint16)
    packed = (codes.reshape(n, width).astype(np.uint16) << shifts).sum(axis=1, dtype=np.uint16)
    known = np.zeros(16 if width == 4 else 4, np.int8)
    known[: len(values)] = values
    nibbles = np.arange(16)
    meant = known[nibbles] if width == 4 else known[np.stack([nibbles % 4, nibbles // 4])]
    parts = (np.ascontiguousarray(entries), packed, np.resize(meant, 32))
    return np.concatenate([one.view(np.uint8).reshape(-1) for one in parts])


# --- the format -----------------------------------------------------------------------------------


def _tiling(n_words: int, scaled: bool) -> Callable[..., None]:
    whole = n_words // 4 * 4

    def words(src: Any, row_bytes: Any, dst: Any) -> None:
        interleave_words(src, row_bytes, dst, whole)
        if n_words != whole:  # the last four, some of them again
            copy_runs(dst + (n_words - 4) * 64, src + (n_words - 4) * 4, row_bytes, 4)

    def tile_block(src: Any, row_bytes: Any, dst: Any) -> None:
        interleave_halves(src, row_bytes, dst)
        words(src + 2, row_bytes, dst + 32)

    return tile_block if scaled else words


def codebook_format(
    ggml_type: str, n_words: int, n_scales: int, unpack: Callable[..., None], *,
    table: str | None = None, times: int = 1,
    scale_of: Callable[[Bytes, Bytes], None] | None = None,
) -> Format:  # fmt: skip
    """A format whose blocks are a float16 d and `n_words` words.

    Args:
        ggml_type: GGML's name.
        n_words: words of a block behind d.
        n_scales: sub-blocks with a scale of their own, 8 or 16.
        unpack: of `Unpacked`.
        table: the type whose table it is, if it is another's.
        times: the table's numbers are those of gguf times this.
        scale_of: sets d of blocks [.., block_bytes] to the float16s [.., 2], where it is no field
            at their beginning.
    """
    runs = (((2, 2),) if scale_of is None else ()) + ((4 * n_words, 4),)
    block_bytes = sum(size for size, _ in runs)

    def encode(x: Floats) -> Bytes:
        weight_blocks(x, BLOCK)
        raise UnsupportedError(
            f"{ggml_type} is read, not written: its codebook wants importances; "
            "take a format of 'headrace compress'"
        )

    @np.errstate(all="ignore")
    def decode(raw: Bytes) -> Floats:
        from gguf import GGMLQuantizationType, quants

        blocks = byte_blocks(raw, block_bytes)
        return quants.dequantize(as_rows(blocks), GGMLQuantizationType[ggml_type])

    def entries() -> Bytes:
        from gguf import quants

        found: Any = getattr(quants, table or ggml_type)
        found.init_grid()
        return table_of((found.grid.reshape(found.grid_shape) * times).astype(np.int8))

    def examples(rng: np.random.Generator, rows: int, n: int) -> Bytes:
        blocks = rng.integers(0, 256, (rows, n // BLOCK, block_bytes), dtype=np.uint8)
        blocks[0], blocks[-1] = 0xFF, 0
        d = half_bytes((2.0 ** rng.uniform(-13, -10, blocks.shape[:2]))[..., None])
        if scale_of is None:
            blocks[..., :2] = d
        else:
            scale_of(blocks, d)
        return as_rows(blocks)

    def tile(raw: Bytes) -> Bytes:
        return interleave(byte_blocks(raw, block_bytes), runs)

    def untile(tiled: Bytes, rows: int) -> Bytes:
        return as_rows(deinterleave(tiled, rows, runs))

    return Format(
        name=ggml_type.lower(),
        ggml_type=ggml_type,
        modules=("codebook", ggml_type.lower()),
        block=BLOCK,
        block_bytes=block_bytes,
        tile_block_bytes=16 * block_bytes,
        activation="q8",
        encode=encode,
        decode=decode,
        tile=tile,
        untile=untile,
        product=_PRODUCTS[n_scales],
        tile_block=_tiling(n_words, scale_of is None),
        row_block=_row_of(n_scales),
        unpacked=Unpacked(
            tile_block_bytes=CODES[n_scales] + 16 * BLOCK,
            unpack=unpack,
            table=entries,
            examples=examples,
        ),
    )
