"""Reads that bring an expert into its slot: which bytes of the file, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.loaders.model_file import TensorInfo
from headrace.offload import expert_store as store
from headrace.offload.files import PAGE

READ_BYTES = 2 << 20  # at most, at once
ROWS_BYTES = 512 << 10  # the same of rows that are tiled, where experts are small


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """A matrix of an expert, in the file and as kernels read it.

    Attributes:
        info: where it is.
        n_bytes: tiled, in memory.
        tile: address of the kernel that tiles its rows; 0: the file has it tiled.
        row_bytes, blocks, rows: of raw rows.
    """

    info: TensorInfo
    n_bytes: int
    tile: int = 0
    row_bytes: int = 0
    blocks: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class ExpertRead:
    info: TensorInfo
    start: int  # byte of the tensor
    n_bytes: int
    to: int
    tile: int = 0
    row_bytes: int = 0
    blocks: int = 0
    tiles: int = 0
    parts: int = 0  # a bit in each of their fields (`headrace.offload.expert_store`)


def pages(n_bytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-n_bytes // PAGE) * PAGE


def rows_at_once(slot_bytes: int) -> int:
    """Bytes of rows to read at once that are tiled then, at most: every reader has such a buffer.

    All of them together take no more than two large experts do.
    """
    return min(READ_BYTES, max(ROWS_BYTES, slot_bytes // 8))


def landing_bytes(n_bytes: int) -> int:
    """Of a reader's buffer for tiles of so many bytes of rows, which begin anywhere in pages."""
    return pages(n_bytes) + PAGE


def slot_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where the matrices of an expert lie in its slot, and the bytes of that."""
    offsets, total = [], 0
    for n_bytes in sizes:
        offsets.append(total)
        total += pages(n_bytes)
    return offsets, total


def reads_of(matrix: ExpertMatrix, to: int, part: int, rows_bytes: int) -> list[ExpertRead]:
    bit = 1 << (store.PART_BITS * part)
    if not matrix.tile:
        return [
            ExpertRead(matrix.info, at, min(READ_BYTES, matrix.n_bytes - at), to + at, parts=bit)
            for at in range(0, matrix.n_bytes, READ_BYTES)
        ]
    tiles, tile_bytes = -(-matrix.rows // 16), matrix.n_bytes // -(-matrix.rows // 16)
    at_once = max(1, rows_bytes // (16 * matrix.row_bytes))
    found = []
    for tile in range(0, tiles, at_once):
        n = min(at_once, tiles - tile)
        rows = min(16 * (tile + n), matrix.rows) - 16 * tile
        found.append(
            ExpertRead(
                matrix.info, 16 * tile * matrix.row_bytes, rows * matrix.row_bytes,
                to + tile * tile_bytes, matrix.tile, matrix.row_bytes, matrix.blocks, n, bit,
            )
        )  # fmt: skip
    return found


def joined(reads: Sequence[ExpertRead]) -> list[ExpertRead]:
    """Reads that go on where the one before ends, in the file and in the slot, made one."""
    found: list[ExpertRead] = []
    for one in reads:
        last = found[-1] if found else None
        if (
            last is not None
            and not one.tile
            and not last.tile
            and one.info.path == last.info.path
            and one.info.offset + one.start - last.info.offset - last.start == one.to - last.to
            and 0 <= one.to - last.to - last.n_bytes < PAGE
            and one.to + one.n_bytes - last.to <= READ_BYTES
        ):
            n_bytes = one.to + one.n_bytes - last.to
            parts = last.parts | one.parts
            found[-1] = ExpertRead(last.info, last.start, n_bytes, last.to, parts=parts)
        else:
            found.append(one)
    return found
