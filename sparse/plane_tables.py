"""Bit planes by one token: tables of sums, and the product that looks them up.

"tables" activations of a token: for each 64 inputs 16 tables of 16 bytes; table 8c + 4h + q is of
inputs 32c + 16h + 4b + q, b = 0..3, and its number n is x + x + x + x, each negated if bit b of n
is not set, over the scale of the 64, rounded to even, plus 128. Behind the tables, the scales: the
largest number / 127, float32. A number is rounded once, whatever the planes are, and each sum of
them is an integer; what follows is not fused, so that every target gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.interleaving import ask_for
from headrace.targets.simd import (
    absolute,
    arg_int,
    arg_ptr,
    bcast_f32,
    bits_f32,
    f32,
    get_i64,
    iota_i32,
    load_f16,
    load_f32,
    max_f32,
    maximum,
    plane_sums,
    put_f32,
    round_i32,
    shl,
    shr,
    splat_f32,
    splat_i32,
    store_f32,
    store_i8,
    to_f32,
    zeros_f32,
)
from headrace.targets.table import Case, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

INPUTS = 64  # that share a scale: a block of the formats
TABLE_BYTES = 256  # of so many
BIAS = 128


def table_bytes(inputs: int) -> int:
    """Bytes of one token's tables and scales, a multiple of 64."""
    return -(-inputs // INPUTS * (TABLE_BYTES + 4) // 64) * 64


# --- making tables --------------------------------------------------------------------------------


def _number(x: Any, signs: Any) -> Any:
    """The 16 sums of the inputs at x, x + 16, .. bytes; `signs` are 15 - n, as bits to flip."""
    total = _signed(x, shl(signs, 31)) + _signed(x + 16, shl(shr(signs, 1), 31))
    return total + _signed(x + 32, shl(shr(signs, 2), 31)) + _signed(x + 48, shl(shr(signs, 3), 31))


def _signed(x: Any, flip: Any) -> Any:
    return bcast_f32(x, 1, 0) * bits_f32(flip ^ splat_i32(0x3F800000))


def to_tables(row: Any, n: Any, out: Any, token: Any, group: Any) -> None:
    """Consumer of `headrace.kernels.prepare`: a float32 row to the place of a token."""
    blocks = n // INPUTS
    scales = out + blocks * TABLE_BYTES
    signs = splat_i32(15) - iota_i32()
    zero = splat_f32(0.0)
    for block in range(blocks):
        x = row + block * (INPUTS * 4)
        most = zeros_f32(1)
        for table in range(16):
            most = maximum(most, absolute(_number(x + (table // 4 * 64 + table % 4 * 4), signs)))
        peak = max_f32(most)
        up = zero
        if peak > 0:
            up = splat_f32(f32(127.0) / peak)
        put_f32(scales + block * 4, peak * f32(1.0 / 127.0))
        for table in range(16):
            v = _number(x + (table // 4 * 64 + table % 4 * 4), signs) * up
            store_i8(out + (block * TABLE_BYTES + table * 16), round_i32(v) + splat_i32(BIAS), 0)


# --- looking them up ------------------------------------------------------------------------------


def gemv(fmt: Format, target: Target) -> KernelFunction:
    """y[token, row] = bias[row] + sum over blocks of d * scale * sums of numbers.

    Slots as in `headrace.sparse.linear`; 9 is the bytes between tokens. Threads share the tiles.
    """
    bits, tile_block_bytes, ahead = fmt.planes, fmt.tile_block_bytes, target.ahead

    def looked_up(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1) + arg_int(args, 6) * thread
        y = arg_ptr(args, 2)
        n_blocks = arg_int(args, 3)
        n_tiles = arg_int(args, 4)
        n_tokens = get_i64(arg_ptr(args, 5))
        y_stride = arg_int(args, 7)
        bias = arg_ptr(args, 8)
        x_stride = arg_int(args, 9)
        for t in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
            for token in range(n_tokens):
                at = w + t * n_blocks * tile_block_bytes
                tables = x + token * x_stride
                scales = tables + n_blocks * TABLE_BYTES
                acc = load_f32(bias + t * 64, 1, 0)
                for block in range(n_blocks):
                    if ahead:
                        ask_for(at + ahead, tile_block_bytes)
                    d = load_f16(at, 1, 0) * bcast_f32(scales + block * 4, 1, 0)
                    acc = acc + d * to_f32(plane_sums(at + 2 * TILE_ROWS, tables, bits))
                    at = at + tile_block_bytes
                    tables = tables + TABLE_BYTES
                store_f32(y + (t * 64 + token * y_stride), acc, 0)

    return looked_up


# --- references -----------------------------------------------------------------------------------


def code_tables(x: np.ndarray, tokens: int = 1) -> np.ndarray:
    """Reference of the "tables" activations, bit for bit: float32 [n_tokens, n] -> uint8.

    `tokens` a group is 1: tokens lie one behind the other.
    """
    import numpy as np

    n_tokens, n = x.shape
    by_table = np.ascontiguousarray(x, np.float32).reshape(n_tokens, n // INPUTS, 4, 4, 4)
    numbers = np.zeros((*by_table.shape[:3], 4, 16), np.float32)  # [.., 2c + h, q, number]
    signs = np.where(np.arange(16) >> np.arange(4)[:, None] & 1, np.float32(1), np.float32(-1))
    for b in range(4):
        numbers = numbers + by_table[..., b, :, None] * signs[b]
    peak = np.abs(numbers).max(axis=(2, 3, 4))
    up = np.where(peak > 0, np.float32(127) / np.where(peak > 0, peak, 1), 0).astype(np.float32)
    codes = np.rint(numbers * up[..., None, None, None]).astype(np.int32) + BIAS
    scales = peak * np.float32(1 / 127)
    out = np.zeros((n_tokens, table_bytes(n)), np.uint8)
    end = n * 4
    out[:, :end] = codes.reshape(n_tokens, -1)
    out[:, end : end + n // 16] = scales.view(np.uint8)
    return out


def multiply(fmt: Format, raw: np.ndarray, tables: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Reference of the products, bit for bit: float32 [tokens, rows]."""
    import numpy as np

    from headrace.sparse.int_planes import unpack_planes

    blocks = raw.reshape(len(raw), -1, fmt.block_bytes)
    n_blocks, n_tokens = blocks.shape[1], len(tables)
    codes = unpack_planes(np.ascontiguousarray(blocks[..., 2:]), fmt.planes)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)[..., 0]
    by_table = codes.reshape(len(raw), n_blocks, 4, 4, 4)
    end = n_blocks * TABLE_BYTES
    numbers = tables[:, :end].reshape(n_tokens, n_blocks, 4, 4, 16).astype(np.int64) - BIAS
    scales = np.ascontiguousarray(tables[:, end : end + 4 * n_blocks]).view(np.float32)
    sums = np.zeros((n_tokens, len(raw), n_blocks), np.int64)
    block, chunk, q = np.ogrid[:n_blocks, :4, :4]
    for p in range(fmt.planes):
        chosen = ((by_table >> p & 1) << np.arange(4)[:, None]).sum(axis=3)
        sums += numbers[:, block, chunk, q, chosen].sum(axis=(-1, -2)) << p
    out = np.broadcast_to(bias[: len(raw)], (n_tokens, len(raw))).astype(np.float32)
    for i in range(n_blocks):
        out = out + (d[:, i] * scales[:, i, None]) * sums[..., i].astype(np.float32)
    return out


def cases(fmt: Format) -> Any:
    """Of the row "gemv"."""

    def of(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        for rows, n_blocks, n_tokens in ((16, 1, 1), (100, 3, 1), (37, 2, 4)):
            n = fmt.block * n_blocks
            raw = fmt.encode(rng.standard_normal((rows, n)).astype(np.float32))
            codes = rng.integers(0, 256, raw[1].shape, dtype=np.uint8)
            codes.reshape(-1, fmt.block_bytes)[:, :2] = raw[1].reshape(-1, fmt.block_bytes)[:, :2]
            raw[1] = codes
            x = rng.standard_normal((n_tokens, n)).astype(np.float32)
            x[0, ::2] *= 1000
            x[-1, :64] = 3.0 if n_tokens == 1 else 0.0  # the largest sums; a scale of 0
            tables = code_tables(x)
            bias = np.zeros(-(-rows // TILE_ROWS) * TILE_ROWS, np.float32)
            bias[:rows] = rng.standard_normal(rows)
            y = np.zeros((n_tokens, len(bias)), np.float32)
            expected = np.zeros_like(y)
            expected[:, :rows] = multiply(fmt, raw, tables, bias)
            slots = [
                fmt.tile(raw), tables, y, n_blocks, len(bias) // 16, np.array([n_tokens], np.int64),
                0, y.strides[0], bias, tables.strides[0],
            ]  # fmt: skip
            yield Case(slots, [(y, expected)], 0, f"{rows}x{n}, {n_tokens} tokens")

    return of
