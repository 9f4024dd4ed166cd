"""What a weight format is, and the one rule by which all of them are tiled.

*Raw* bytes are what a GGUF file holds: row after row, a row being a run of blocks. *Tiled* bytes
are what the kernels read: 16 rows (a tile) go through their blocks together. A tile block is the
16 row blocks cut into fields, and of every field equal runs of the 16 rows lie side by side:

    field of scales, run 2:  row 0's float16, row 1's float16, ... row 15's
    field of codes,  run 4:  4 code bytes of row 0, 4 of row 1, ... 4 of row 15 | the next 4 ...

so 64 bytes hold 4 code bytes of 16 rows, and a kernel multiplies them by 4 activations that it
broadcasts. A last tile with fewer than 16 rows is filled with rows of zero bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from headrace.sparse.grid import Grid
    from headrace.sparse.pattern import Pattern

TILE_ROWS = 16

# uint8 and float32: numpy's stubs lose the dtype of `byte & 15`, so the checker is not told.
Bytes: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[Any]
Runs: TypeAlias = tuple[tuple[int, int], ...]  # (bytes of the field, bytes of a run), in order


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A plainer form of tile blocks, which kernels make of them in cache before they multiply.

    It has its own 16 rows side by side like any tile block, and all its fields lie in vectors of
    64 bytes, 4 of each row.

    Args:
        tile_block_bytes: of that form.
        unpack: native: (w, table, out), a tile block (or a strip of one) to that form.
        table: the bytes that `unpack` looks entries up in; None: it needs none.
        examples: raw rows of any codes with scales near 1: (generator, rows, n) -> [rows, bytes].
            Of formats that are read only; None: `encode` makes them.
    """

    tile_block_bytes: int
    unpack: Callable[..., None]
    table: Callable[[], Bytes] | None = None
    examples: Callable[[np.random.Generator, int, int], Bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """What matrix products must know of tiled weights; `encode`, `decode`, `tile` are in numpy.

    Args:
        name: ours.
        modules: files of `headrace.sparse` with its native functions, if not one of its name.
        block: weights that share a scale; the length of a row is a multiple of it.
        tile_block_bytes: bytes of a block of 16 rows, tiled.
        activation: what kernels multiply the weights by, INT8 ("q8") or float32 ("f32"), or INT8
            but for one token tables of sums ("tables", of `headrace.sparse.plane_tables`).
        encode: float32 [rows, n] -> raw uint8 [rows, row_bytes].
        decode: raw uint8 [rows, row_bytes] -> float32 [rows, n].
        tile: raw uint8 [rows, row_bytes] -> uint8 [n_tiles, n_blocks, tile_block_bytes].
        product: the native inner loop; see `headrace.sparse.linear`.
        unpacked: the form that `product` takes, if it is not the tile block.
    """

    name: str
    modules: tuple[str, ...] = ()
    block: int
    tile_block_bytes: int
    activation: Literal["q8", "f32", "tables"]
    encode: Callable[[Floats], Bytes]
    decode: Callable[[Bytes], Floats]
    tile: Callable[[Bytes], Bytes]
    product: Callable[..., Any]
    unpacked: Unpacked | None = None


@dataclass(frozen=True, kw_only=True)
class Format(Tiled):
    """How a weight matrix is coded in a file.

    Args:
        ggml_type: GGML's name of the same bytes; None for formats that only our own files hold.
        block_bytes: bytes of a block of one row, as in the file.
        planes: bit planes that choose from such tables.
        untile: tiled bytes, rows -> raw uint8 [rows, row_bytes].
        tile_block, row_block: the other native inner loops; see `headrace.sparse.linear`.
        tile_run: a number of blocks, and `tile_block` for so many at once: for small blocks.
        grid: what scales and codes are, for those who search and round better than `encode`.
        pattern: the same, of formats that keep some of the weights only.
    """

    ggml_type: str | None = None
    block_bytes: int
    planes: int = 0
    untile: Callable[[Bytes, int], Bytes]
    tile_block: Callable[..., None]
    row_block: Callable[..., None]
    tile_run: tuple[int, Callable[..., None]] | None = None
    grid: Grid | None = None
    pattern: Pattern | None = None

    @property
    def written(self) -> bool:
        """Whether `encode` makes it; else it raises UnsupportedError."""
        return self.unpacked is None or self.unpacked.examples is None

    @property
    def searched(self) -> bool:
        """Whether scales can be searched and weights be rounded by GPTQ."""
        return self.grid is not None or self.pattern is not None

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight in the file, scales included."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, n: int) -> int:
        """Bytes of a raw row of `n` weights."""
        return self._n_blocks(n) * self.block_bytes

    def tiled_bytes(self, rows: int, n: int) -> int:
        """Bytes of a tiled matrix of `rows` x `n` weights, padding of the last tile included."""
        return -(-rows // TILE_ROWS) * self._n_blocks(n) * self.tile_block_bytes

    def _n_blocks(self, n: int) -> int:
        if n % self.block:
            raise ValueError(f"{self.name}: a row of {n} weights is no multiple of {self.block}")
        return n // self.block


def weight_blocks(x: Floats, block: int) -> Floats:
    """Cut float32 [rows, n] into [rows, n_blocks, block]."""
    rows, n = x.shape
    if n % block:
        raise ValueError(f"a row of {n} weights is no multiple of the block of {block}")
    return np.ascontiguousarray(x, np.float32).reshape(rows, n // block, block)


def byte_blocks(raw: Bytes, block_bytes: int) -> Bytes:
    """Cut raw uint8 [rows, row_bytes] into [rows, n_blocks, block_bytes]."""
    rows, row_bytes = raw.shape
    if row_bytes % block_bytes:
        raise ValueError(f"a row of {row_bytes} bytes is no multiple of the block of {block_bytes}")
    return np.ascontiguousarray(raw, np.uint8).reshape(rows, row_bytes // block_bytes, block_bytes)


def as_rows(blocks: NDArray[Any]) -> NDArray[Any]:
    """Join [rows, n_blocks, k] to [rows, n_blocks * k], also where a dimension is 0."""
    rows, n_blocks, k = blocks.shape
    return blocks.reshape(rows, n_blocks * k)


def half_bytes(x: Floats) -> Bytes:
    """Round float32 [..., k] to float16 and give their bytes [..., 2 * k]."""
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint8)


def halves(field: Bytes) -> Floats:
    """Read the bytes [..., 2 * k] of float16 as float32 [..., k]."""
    return np.ascontiguousarray(field).view(np.float16).astype(np.float32)


def pack_nibbles(codes: Bytes) -> Bytes:
    """Pack codes 0..15 [..., 2 * k] into [..., k]: the first half low, the second half high."""
    low, high = np.split(codes, 2, axis=-1)
    packed: Bytes = low | (high << 4)
    return packed


def unpack_nibbles(packed: Bytes) -> Bytes:
    """Undo `pack_nibbles`: [..., k] -> [..., 2 * k]."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def transpose_bits(bits: Bytes, rows: int) -> Bytes:
    """Transpose 32 bits [..., 4] as a matrix of `rows`: 8 is bit 4g + i to 8i + g, 4 undoes it."""
    each = np.unpackbits(bits, axis=-1, bitorder="little")
    matrix = each.reshape(*bits.shape[:-1], rows, 32 // rows).swapaxes(-1, -2)
    return np.packbits(matrix.reshape(each.shape), axis=-1, bitorder="little")


def interleave(blocks: Bytes, runs: Runs) -> Bytes:
    """Tile row blocks: [rows, n_blocks, k] -> [n_tiles, n_blocks, 16 * k].

    Args:
        blocks: the bytes of every block of every row, its fields in the order of `runs`.
        runs: for each field its bytes, and how many of them lie together before the next row's.
    """
    rows, n_blocks, k = blocks.shape
    n_tiles = -(-rows // TILE_ROWS)
    if rows % TILE_ROWS:
        padding = np.zeros((n_tiles * TILE_ROWS - rows, n_blocks, k), np.uint8)
        blocks = np.concatenate([blocks, padding])
    by_tile = blocks.reshape(n_tiles, TILE_ROWS, n_blocks, k)
    tiled = np.empty((n_tiles, n_blocks, TILE_ROWS * k), np.uint8)
    at = 0
    for size, run in runs:
        shape = (n_tiles, TILE_ROWS, n_blocks, size // run, run)
        field = by_tile[..., at : at + size].reshape(shape).transpose(0, 2, 3, 1, 4)
        tiled[..., TILE_ROWS * at : TILE_ROWS * (at + size)] = field.reshape(
            n_tiles, n_blocks, TILE_ROWS * size
        )
        at += size
    return tiled


def deinterleave(tiled: Bytes, rows: int, runs: Runs) -> Bytes:
    """Undo `interleave`: [n_tiles, n_blocks, 16 * k] -> [rows, n_blocks, k]."""
    n_tiles, n_blocks, tile_block_bytes = tiled.shape
    if -(-rows // TILE_ROWS) != n_tiles:
        raise ValueError(f"{n_tiles} tiles of {TILE_ROWS} rows do not hold {rows} rows")
    by_tile = np.empty((n_tiles, TILE_ROWS, n_blocks, tile_block_bytes // TILE_ROWS), np.uint8)
    at = 0
    for size, run in runs:
        shape = (n_tiles, n_blocks, size // run, TILE_ROWS, run)
        field = tiled[..., TILE_ROWS * at : TILE_ROWS * (at + size)].reshape(shape)
        by_tile[..., at : at + size] = field.transpose(0, 3, 1, 2, 4).reshape(
            n_tiles, TILE_ROWS, n_blocks, size
        )
        at += size
    return by_tile.reshape(n_tiles * TILE_ROWS, *by_tile.shape[2:])[:rows]
