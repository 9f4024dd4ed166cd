"""Grids of formats whose blocks are fields of bytes: scales, offsets and codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from headrace.sparse.format import Bytes, Floats, as_rows, byte_blocks, half_bytes, halves
from headrace.sparse.grid import Grid
from headrace.sparse.scale_search import half, search_affine_groups, search_groups

PutCodes = Callable[[Bytes, Bytes], None]


def scaled_grid(
    block: int,
    block_bytes: int,
    values: Sequence[float],
    put: PutCodes,
    *,
    group: int | None = None,
    field: slice = slice(0, 2),
    to_bytes: Callable[[Floats], Bytes] = half_bytes,
    of_bytes: Callable[[Bytes], Floats] = halves,
    allowed: Callable[[Floats], Floats] = half,
) -> Grid:
    """The grid of a format with a scale for each group.

    Args:
        block, block_bytes: weights and bytes of a block.
        values: of the codes 0, 1, ... of the format; one may come twice.
        put: writes codes uint8 [rows, n_blocks, block] into row blocks [rows, n_blocks, bytes].
        group: weights that share a scale; default: the block.
        field: where the scales of a block are.
        to_bytes, of_bytes: float32 [rows, n_blocks, scales] to their bytes, and back.
        allowed: the nearest scales that the format has.
    """
    size = group or block
    levels = tuple(sorted(set(map(float, values))))
    code_of = np.array([list(map(float, values)).index(level) for level in levels], np.uint8)

    def fit(x: Floats, importance: Floats | None) -> Bytes:
        rows, n = x.shape
        raw = np.zeros((rows, n // block, block_bytes), np.uint8)
        found = search_groups(x, importance, size, levels, allowed)
        raw[..., field] = to_bytes(found.reshape(rows, n // block, block // size))
        return as_rows(raw)

    def scales(raw: Bytes) -> tuple[Floats, None]:
        found = of_bytes(np.ascontiguousarray(byte_blocks(raw, block_bytes)[..., field]))
        return found.reshape(len(raw), -1), None

    def put_levels(raw: Bytes, codes: Bytes) -> Bytes:
        blocks = byte_blocks(raw, block_bytes).copy()
        put(blocks, code_of[codes].reshape(*blocks.shape[:2], block))
        return as_rows(blocks)

    return Grid(group=size, levels=levels, fit=fit, scales=scales, put=put_levels)


def affine_grid(block: int, block_bytes: int, steps: int, put: PutCodes) -> Grid:
    """The grid of a format of `d * code + m`, code 0..steps, that begins with float16 d and m."""

    def fit(x: Floats, importance: Floats | None) -> Bytes:
        rows, n = x.shape
        raw = np.zeros((rows, n // block, block_bytes), np.uint8)
        d, m = search_affine_groups(x, importance, block, steps)
        raw[..., :4] = half_bytes(np.stack([d, m], axis=-1))
        return as_rows(raw)

    def scales(raw: Bytes) -> tuple[Floats, Floats]:
        both = halves(byte_blocks(raw, block_bytes)[..., :4])
        return both[..., 0], both[..., 1]

    def put_codes(raw: Bytes, codes: Bytes) -> Bytes:
        blocks = byte_blocks(raw, block_bytes).copy()
        put(blocks, codes.reshape(*blocks.shape[:2], block))
        return as_rows(blocks)

    levels = tuple(float(code) for code in range(steps + 1))
    return Grid(group=block, levels=levels, fit=fit, scales=scales, put=put_codes)
