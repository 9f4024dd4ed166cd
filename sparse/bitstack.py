"""BitStack: a matrix as a stack of blocks, each a sign plane and a low-rank magnitude.

A block of W (m x n: outputs by inputs) is S * (U V): S the signs of W (0 counts as positive), U
(m x k) and V (k x n) the leading singular vectors of |W|, with the roots of the singular values in
both. The next block is the same of what is left. b blocks give a better W than b - 1, so that a
model may have as many as there is memory for. U and V are float16, and their rounding is part of
what is left. Source: Wang et al., "BitStack" (ICLR 2025), arXiv 2410.23918.

Bytes of a block. Rows are filled up to tiles of 16, inputs to blocks of 64, with zeros in U and V:

    signs   [tile][block of 64 inputs] x 128 bytes: bit j of byte 64h + 4r + i is the sign of row r
            and input 8j + 4h + i (1: positive)
    V       [k][inputs] float16
    U       [tile][k][16 rows] float16

A product is sum over r of U[:, r] * (S (V[r] * x)): S, expanded to bytes, times k vectors at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.sparse.format import TILE_ROWS, Bytes, Floats

INPUTS = 64  # of a block of signs
SIGN_BYTES = 128  # of one, for 16 rows
RANKS = (1, 2, 4, 8, 16)
LEVELS = 16
_OVERSAMPLING, _ITERATIONS = 16, 8


@dataclass(frozen=True)
class Block:
    """One block of a matrix: `positive` bool [m, n], `u` float16 [m, k], `v` float16 [k, n]."""

    positive: Bytes
    u: Floats
    v: Floats

    def dense(self) -> Floats:
        """What it adds to the matrix: float32 [m, n]."""
        size = self.u.astype(np.float32) @ self.v.astype(np.float32)
        return np.where(self.positive, size, -size)


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a block: `rows` x `columns` with `rank` vectors."""

    rows: int
    columns: int
    rank: int

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.rows // TILE_ROWS)

    @property
    def sign_blocks(self) -> int:
        """Blocks of 64 inputs in a row."""
        return -(-self.columns // INPUTS)

    @property
    def v_offset(self) -> int:
        """Where V begins."""
        return self.tiles * self.sign_blocks * SIGN_BYTES

    @property
    def u_offset(self) -> int:
        """Where U begins."""
        return self.v_offset + 2 * self.rank * self.sign_blocks * INPUTS

    @property
    def n_bytes(self) -> int:
        """Bytes of the block."""
        return self.u_offset + 2 * self.rank * self.tiles * TILE_ROWS


def rank_for(width: int) -> int:
    """Vectors of a block in a model of this width: 16 at 4096, so that they cost a tenth of a bit.

    The next power of two, as kernels are made for these.
    """
    return next((rank for rank in RANKS if rank >= 16 * width / 4096), RANKS[-1])


def decompose(w: Floats, rank: int, levels: int) -> Iterator[tuple[Block, Floats]]:
    """The blocks of float32 [m, n], each with what is left after it: float32 [m, n].

    All inputs count the same; `headrace.sparse.bitstack_fit` has it for those of a text.

    Args:
        w: the matrix.
        rank: vectors of a block.
        levels: blocks.
    """
    left = w.astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(levels):
        u, v = leading(np.abs(left), min(rank, *left.shape), rng)
        block = Block(left >= 0, filled(u.T, rank).T, filled(v, rank))
        left -= block.dense()
        yield block, left


def rebuild(blocks: Sequence[Block]) -> Floats:
    """The matrix that these stand for: float32 [m, n]."""
    total = blocks[0].dense()
    for block in blocks[1:]:
        total += block.dense()
    return total


def filled(vectors: Floats, rank: int) -> Floats:
    """float16 [rank, ...]: a small matrix has fewer vectors than are kept."""
    out = np.zeros((rank, vectors.shape[1]), np.float16)
    out[: len(vectors)] = vectors
    return out


def leading(size: Floats, k: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """u [m, k] and v [k, n], the best of their rank: u v is near `size` (float32 [m, n]).

    By subspace iteration from random vectors: |W| has one large singular value and many that are
    nearly equal, so that which of those are found matters little for what is left.
    """
    count = min(k + _OVERSAMPLING, *size.shape)
    found = size @ rng.standard_normal((size.shape[1], count), np.float32)
    for _ in range(_ITERATIONS):
        found = size @ (size.T @ np.linalg.qr(found)[0])
    basis = np.linalg.qr(found)[0]
    u, s, v = np.linalg.svd(basis.T @ size, full_matrices=False)
    root = np.sqrt(s[:k])
    return (basis @ u[:, :k]) * root, root[:, None] * v[:k]


def pack(block: Block) -> Bytes:
    """The bytes of a block: uint8 [n_bytes]."""
    (m, k), n = block.u.shape, block.v.shape[1]
    shape = BlockShape(m, n, k)
    tiles, blocks = shape.tiles, shape.sign_blocks
    signs = np.zeros((tiles * TILE_ROWS, blocks * INPUTS), np.uint8)
    signs[:m, :n] = block.positive
    by_bit = signs.reshape(tiles, TILE_ROWS, blocks, 8, 2, 4).transpose(0, 2, 4, 1, 5, 3)
    v = np.zeros((k, blocks * INPUTS), np.float16)
    v[:, :n] = block.v
    u = np.zeros((tiles * TILE_ROWS, k), np.float16)
    u[:m] = block.u
    tiled = np.ascontiguousarray(u.reshape(tiles, TILE_ROWS, k).transpose(0, 2, 1))
    parts = [np.packbits(by_bit, axis=-1, bitorder="little"), v.view(np.uint8), tiled.view("u1")]
    return np.concatenate([part.reshape(-1) for part in parts])


def unpack(raw: Bytes, shape: BlockShape) -> Block:
    """Undo `pack`."""
    tiles, blocks, k = shape.tiles, shape.sign_blocks, shape.rank
    bits = np.unpackbits(raw[: shape.v_offset], bitorder="little")
    signs = bits.reshape(tiles, blocks, 2, TILE_ROWS, 4, 8).transpose(0, 3, 1, 5, 2, 4)
    positive = signs.reshape(tiles * TILE_ROWS, blocks * INPUTS)[: shape.rows, : shape.columns]
    v = raw[shape.v_offset : shape.u_offset].view(np.float16).reshape(k, blocks * INPUTS)
    u = raw[shape.u_offset :].view(np.float16).reshape(tiles, k, TILE_ROWS).transpose(0, 2, 1)
    return Block(
        positive.astype(bool),
        np.ascontiguousarray(u).reshape(tiles * TILE_ROWS, k)[: shape.rows],
        np.ascontiguousarray(v[:, : shape.columns]),
    )
