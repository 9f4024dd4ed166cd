"""Sums of one run of tiles by one group of tokens: the inner loops of matrix products."""

from __future__ import annotations

from typing import Any

from headrace.sparse.interleaving import ask_for
from headrace.targets.simd import (
    add_pairs,
    by_token,
    join,
    load_f32,
    outer,
    past_q8,
    repeat,
    splat_f32,
    store_f32_grid,
    sub_block,
    zeros_f32,
)


def by_columns(product: Any, tokens: int, columns: int, group: int) -> Any:
    """A format's product for `tokens` of a group, at most `columns` of them at a time."""

    def whole(acc: Any, w: Any, stride: Any, x: Any, rows: Any) -> Any:
        return product(acc, w, stride, x, tokens, rows, group)

    if tokens <= columns:
        return whole
    half = tokens // 2
    one = by_columns(product, half, columns, group)

    def halves(acc: Any, w: Any, stride: Any, x: Any, rows: Any) -> Any:
        first = one(sub_block(acc, 0, half), w, stride, x, rows)
        second = one(sub_block(acc, half, half), w, stride, past_q8(x, half), rows)
        return join(first, second)

    return halves


def sums(
    multiply: Any, tile_block_bytes: int, x_advance: int, tokens: int, pairs: bool,
    in_columns: bool, chains: int = 1, ahead: int = 0,
) -> Any:  # fmt: skip
    """The function that sums all blocks of some tiles and stores rows of y.

    Args:
        multiply: a product made by `by_columns`.
        tile_block_bytes, x_advance: bytes from block to block, of a tile and of activations.
        tokens: columns that are multiplied at once; with `pairs` two of them make a token.
        in_columns: whether `multiply` takes them some at a time.
        chains: 4: every sum is 4, of every fourth block.
        ahead: weights are asked for so many bytes before they are used (0: the CPU's business).
    """
    out_tokens = tokens // 2 if pairs else tokens
    share = 0.5 if pairs else 1.0  # of the bias, which both columns of a pair start from

    def advance(x: Any) -> Any:
        return past_q8(x, tokens) if in_columns else x + x_advance

    def some(
        w: Any, x: Any, y: Any, n_blocks: Any, tile_stride: Any, y_stride: Any, bias: Any, rows: Any
    ) -> None:
        acc = outer(load_f32(bias, rows, 64), repeat(splat_f32(share), tokens))
        left = n_blocks
        if chains == 4:
            left = n_blocks & 3
            acc1 = zeros_f32(tokens)
            acc2 = acc1
            acc3 = acc1
            for _ in range(n_blocks >> 2):
                if ahead:
                    ask_for(w + ahead, 4 * tile_block_bytes)
                acc = multiply(acc, w, tile_stride, x, rows)
                w1 = w + tile_block_bytes
                x1 = x + x_advance
                acc1 = multiply(acc1, w1, tile_stride, x1, rows)
                w2 = w1 + tile_block_bytes
                x2 = x1 + x_advance
                acc2 = multiply(acc2, w2, tile_stride, x2, rows)
                w3 = w2 + tile_block_bytes
                x3 = x2 + x_advance
                acc3 = multiply(acc3, w3, tile_stride, x3, rows)
                w = w3 + tile_block_bytes
                x = x3 + x_advance
            acc = (acc + acc1) + (acc2 + acc3)
        for _ in range(left):
            if ahead:
                ask_for(w + ahead, tile_block_bytes)
            acc = multiply(acc, w, tile_stride, x, rows)
            w = w + tile_block_bytes
            x = advance(x)
        if pairs:
            store_f32_grid(y, add_pairs(acc), out_tokens, 64, y_stride)
        else:
            store_f32_grid(y, by_token(acc), tokens, 64, y_stride)

    return some
