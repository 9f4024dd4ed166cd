"""Weights of ONNX Runtime's MatMulNBits: 4-bit codes, float32 scales, zero points that are codes.

No format of files of ours, but one that products multiply by: a weight is `d * (code - z)`. Scales
stay as they are (the INT4 of `headrace.sparse.int4` has float16 ones). Codes and zero points are as
in https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits.

Where activations are INT8 ("q8"), groups are of 32 or 128. Raw block of a group, one row:
    field   bytes                   what
    d       4                       float32
    z       1                       code of zero
    qs      16 for each 32 inputs   byte b = code of input b | code of input 16 + b

Tile block: 16 times d, 16 times z, then qs of 16 rows in runs of 4 bytes. For float32 activations
see `headrace.kernels.n_bits_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from headrace.sparse.format import (
    TILE_ROWS,
    Bytes,
    Floats,
    Tiled,
    as_rows,
    byte_blocks,
    interleave,
    pack_nibbles,
    unpack_nibbles,
    weight_blocks,
)
from headrace.sparse.interleaving import load_eights
from headrace.sparse.linear import products
from headrace.targets.simd import (
    and_u8,
    dot16,
    dot_init,
    dot_result,
    fma,
    fma_outer,
    load_f32,
    load_q8,
    load_u8_i32,
    outer,
    q8_f32,
    repeat,
    shr_u8,
    splat_f32,
    splat_i32,
    to_f32,
)
from headrace.targets.table import Kernel

GROUPS = (32, 128)
OPERATIONS = ("gemv", "gemm")
HEAD = 5  # bytes of a block in front of its codes


def raw_blocks(codes: Bytes, zeros: Bytes, scales: Floats) -> Bytes:
    """Raw rows of codes uint8 [rows, n], zeros uint8 and scales float32 [rows, n / group]."""
    rows, n = codes.shape
    shape = *scales.shape, -1
    packed = pack_nibbles(codes.reshape(rows, n // 32, 32)).reshape(shape)
    d = np.ascontiguousarray(scales, np.float32).view(np.uint8).reshape(shape)
    return as_rows(np.concatenate([d, zeros[..., None], packed], axis=-1))


def parts_of(raw: Bytes, group: int) -> tuple[Bytes, Bytes, Floats]:
    """What `raw_blocks` was made of: codes [rows, n], zeros and scales [rows, n / group]."""
    blocks = byte_blocks(raw, HEAD + group // 2)
    scales = np.ascontiguousarray(blocks[..., :4]).view(np.float32)[..., 0]
    packed = blocks[..., HEAD:].reshape(*scales.shape, -1, 16)
    return unpack_nibbles(packed).reshape(len(raw), -1), blocks[..., 4], scales


def quantised(x: Floats, group: int) -> tuple[Bytes, Bytes, Floats]:
    """Codes [rows, n], zeros and scales [rows, n / group], rounded to nearest."""
    groups = weight_blocks(x, group)
    least, most = groups.min(-1).clip(None, 0), groups.max(-1).clip(0)
    d = ((most - least) / np.float32(15)).astype(np.float32)
    inverse = np.divide(1, d, where=d > 0, out=np.zeros_like(d))
    zeros = np.rint(-least * inverse).clip(0, 15).astype(np.uint8)
    codes = np.rint(groups * inverse[..., None] + zeros[..., None]).clip(0, 15)
    return codes.astype(np.uint8).reshape(x.shape), zeros, d


def weights_of(codes: Bytes, zeros: Bytes, scales: Floats) -> Floats:
    """What these stand for: float32 [rows, n]."""
    rows, n_groups = scales.shape
    steps = codes.reshape(rows, n_groups, -1).astype(np.int8) - zeros[..., None].astype(np.int8)
    found: Floats = scales[..., None] * steps.astype(np.float32)
    return found.reshape(codes.shape)


def _product(group: int) -> Callable[..., Any]:
    codes_at, chunks = TILE_ROWS * HEAD, group // 32

    def product(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, apart: Any) -> Any:
        """acc + one block of `tiles` tiles times `tokens` tokens; see `headrace.sparse.linear`."""
        d = load_f32(w, tiles, stride)
        zero = splat_f32(0.0) - d * to_f32(load_u8_i32(w + 64, tiles, stride))
        for c in range(chunks):
            entry = load_q8(x + c * (48 * apart), tokens)
            codes = w + (codes_at + 256 * c)
            total = dot_init(repeat(splat_i32(0), tokens), tiles)
            v = load_eights(codes, tiles, stride)
            total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 0, 4)
            v = load_eights(codes + 128, tiles, stride)
            total = dot16(total, and_u8(v, 15), shr_u8(v, 4), entry, 8, 4)
            acc = fma(outer(d, q8_f32(entry, 32)), to_f32(dot_result(total, 4)), acc)
            acc = fma_outer(zero, q8_f32(entry, 36), acc)
        return acc

    return product


def _made(group: int) -> Tiled:
    block_bytes = HEAD + group // 2
    runs = ((4, 4), (1, 1), (group // 2, 4))

    def encode(x: Floats) -> Bytes:
        """Round to nearest."""
        return raw_blocks(*quantised(x, group))

    def decode(raw: Bytes) -> Floats:
        """Give the float32 weights."""
        return weights_of(*parts_of(raw, group))

    def tile(raw: Bytes) -> Bytes:
        """Interleave 16 rows: the tile block above."""
        return interleave(byte_blocks(raw, block_bytes), runs)

    return Tiled(
        name=f"n4_g{group}",
        modules=("n_bits",),
        block=group,
        tile_block_bytes=TILE_ROWS * block_bytes,
        activation="q8",
        encode=encode,
        decode=decode,
        tile=tile,
        product=_product(group),
    )


WEIGHTS = {group: _made(group) for group in GROUPS}


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [
        replace(products(of)[operation], owner=__name__)
        for of in WEIGHTS.values()
        for operation in OPERATIONS
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
