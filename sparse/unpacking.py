"""Products and rows of formats that are unpacked before they are multiplied (`format.Unpacked`).

A product of one token unpacks a block and multiplies it while it lies in the first cache. With more
tokens a run of tiles is unpacked as a whole, for all of them. Either way the same sums are formed
in the same order.

Kernels have slots more than other formats': the address of the threads' scratch, the bytes from one
thread's to the next (`scratch_bytes`), and the address of the table.
"""

from __future__ import annotations

from typing import Any

from headrace.sparse.format import TILE_ROWS, Format, Tiled
from headrace.sparse.sums import by_columns, sums
from headrace.targets.simd import (
    add_pairs,
    arg_float,
    arg_int,
    arg_ptr,
    by_token,
    get_f32,
    get_i64,
    load_f32,
    outer,
    put_f32,
    repeat,
    smaller,
    splat_f32,
    store_f32_grid,
    strip,
    with_lanes,
)
from headrace.targets.table import KernelFunction


def scratch_bytes(fmt: Tiled, columns: int, tiles: int) -> int:
    """Bytes of a thread's scratch in products of `columns` weights a row, `tiles` at a time."""
    if fmt.unpacked is None:
        return 0
    return columns // fmt.block * fmt.unpacked.tile_block_bytes * tiles


def unpacking_slots(fmt: Tiled, columns: int, tiles: int) -> list[Any]:
    """The slots of tests and measurements, with room for 4 threads."""
    import numpy as np

    if fmt.unpacked is None:
        return []
    room = np.zeros((4, scratch_bytes(fmt, columns, tiles)), np.uint8)
    table = fmt.unpacked.table
    return [room, room.shape[1], room if table is None else table()]


def unpacked_linear(
    fmt: Tiled, x_advance: int, tiles: int, tokens: int, pairs: bool, lanes: int, columns: int,
    token_pairs: bool,
) -> KernelFunction:  # fmt: skip
    """`headrace.sparse.linear._linear` of such a format. More slots: 10 scratch, 11 its bytes a
    thread, 12 the table."""
    assert fmt.unpacked is not None
    out_tokens = tokens // 2 if pairs else tokens
    unpack, plain_bytes = fmt.unpacked.unpack, fmt.unpacked.tile_block_bytes
    tile_block_bytes = fmt.tile_block_bytes
    strips = TILE_ROWS // lanes
    multiply = by_columns(fmt.product, tokens, columns, tokens)
    some = sums(multiply, plain_bytes, x_advance, tokens, pairs, columns < tokens)
    share = 0.5 if pairs else 1.0

    def unpack_block(w: Any, table: Any, out: Any) -> None:
        if strips == 1:
            unpack(w, table, out)
        else:
            for s in range(strips):
                unpack(strip(w, s), table, out + s * lanes * 4)

    def one_token(
        w: Any, x: Any, y: Any, n_blocks: Any, y_stride: Any, bias: Any, table: Any, out: Any,
        plain: Any,
    ) -> None:  # fmt: skip
        acc = outer(load_f32(bias, 1, 64), repeat(splat_f32(share), tokens))
        for _ in range(n_blocks):
            unpack(w, table, out)
            acc = multiply(acc, plain, 0, x, 1)
            w = w + tile_block_bytes
            x = x + x_advance
        if pairs:
            store_f32_grid(y, add_pairs(acc), out_tokens, 64, y_stride)
        else:
            store_f32_grid(y, by_token(acc), tokens, 64, y_stride)

    def tile_by_blocks(
        w: Any, x: Any, y: Any, n_blocks: Any, y_stride: Any, bias: Any, table: Any, scratch: Any
    ) -> None:
        if strips == 1:
            one_token(w, x, y, n_blocks, y_stride, bias, table, scratch, scratch)
        else:
            for s in range(strips):
                at = s * lanes * 4
                one_token(
                    strip(w, s), x, y + at, n_blocks, y_stride, bias + at, table, scratch + at,
                    strip(scratch, s),
                )  # fmt: skip

    def all_groups(
        plain: Any, x: Any, y: Any, n_blocks: Any, y_stride: Any, bias: Any, x_stride: Any,
        n_groups: Any, rows: Any,
    ) -> None:  # fmt: skip
        tile_stride = n_blocks * plain_bytes
        for g in range(n_groups):
            to = y + g * out_tokens * y_stride
            if strips == 1:
                some(plain, x + g * x_stride, to, n_blocks, tile_stride, y_stride, bias, rows)
            else:
                for s in range(strips):
                    at = s * lanes * 4
                    some(
                        strip(plain, s), x + g * x_stride, to + at, n_blocks, tile_stride,
                        y_stride, bias + at, rows,
                    )  # fmt: skip

    def linear(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1) + arg_int(args, 6) * thread
        y = arg_ptr(args, 2)
        n_blocks = arg_int(args, 3)
        n_tiles = arg_int(args, 4)
        n_tokens = get_i64(arg_ptr(args, 5))
        y_stride = arg_int(args, 7)
        bias = arg_ptr(args, 8)
        x_stride = arg_int(args, 9)
        scratch = arg_ptr(args, 10) + arg_int(args, 11) * thread
        table = arg_ptr(args, 12)
        n_groups = (n_tokens + out_tokens - 1) // out_tokens
        t = n_tiles * thread // n_threads
        last = n_tiles * (thread + 1) // n_threads
        while t < last:
            at = w + t * n_blocks * tile_block_bytes
            to = y + t * 64
            if out_tokens == 1:
                for g in range(n_groups):
                    tile_by_blocks(
                        at, x + g * x_stride, to + g * y_stride, n_blocks, y_stride,
                        bias + t * 64, table, scratch,
                    )  # fmt: skip
                t += 1
            else:
                rows = smaller(tiles, last - t) // tiles * (tiles - 1) + 1  # all, or one
                for b in range(n_blocks * rows):
                    unpack_block(at + b * tile_block_bytes, table, scratch + b * plain_bytes)
                if tiles > 1 and rows == 1:
                    all_groups(
                        scratch, x, to, n_blocks, y_stride, bias + t * 64, x_stride, n_groups, 1
                    )
                else:
                    all_groups(
                        scratch, x, to, n_blocks, y_stride, bias + t * 64, x_stride, n_groups,
                        tiles,
                    )  # fmt: skip
                t += rows

    return with_lanes(linear, lanes, in_order=columns < tokens, token_pairs=token_pairs)


def unpacked_rows(fmt: Format) -> KernelFunction:
    """`headrace.sparse.linear._rows` of such a format. More slots: 9 scratch, 10 its bytes a
    thread, 11 the table."""
    assert fmt.unpacked is not None
    unpack, row_block, block = fmt.unpacked.unpack, fmt.row_block, fmt.block
    tile_block_bytes = fmt.tile_block_bytes

    def rows(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        private = arg_int(args, 6)
        x = arg_ptr(args, 1) + private * thread
        ids = arg_ptr(args, 2)
        n_blocks = arg_int(args, 3)
        n_tokens = get_i64(arg_ptr(args, 4))
        x_stride = arg_int(args, 5)
        scale = arg_float(args, 7)
        width = arg_int(args, 8)
        scratch = arg_ptr(args, 9) + arg_int(args, 10) * thread
        table = arg_ptr(args, 11)
        first = n_tokens * thread // n_threads
        last = n_tokens * (thread + 1) // n_threads
        if private != 0:
            first = 0
            last = n_tokens
        for token in range(first, last):
            row = get_i64(ids + token * 8)
            out = x + token * x_stride
            at = w + (row // 16) * n_blocks * tile_block_bytes
            for b in range(n_blocks):
                unpack(at + b * tile_block_bytes, table, scratch)
                row_block(scratch, row % 16, out + b * block * 4)
            for i in range(width):
                put_f32(out + i * 4, get_f32(out + i * 4) * scale)

    return rows
