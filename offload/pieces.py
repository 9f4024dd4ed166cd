"""Matrices cut into pieces: which stay in memory, which are read for every pass.

A dense model reads all its weights in the same order for every token. Whatever is least recently
used is then needed next, so a cache of any policy is worse than keeping a fixed set: as many pieces
as fit, spread evenly over the pass, so that reading never stands still while those are computed.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

PAGE, HUGE_PAGE = 4096, 2 << 20
LEAST_SLOTS, MOST_SLOTS = 3, 64
LEAST_PIECE_BYTES, USUAL_PIECE_BYTES = 128 << 10, 2 << 20
PIECES, MOST_PIECES = 1024, 4096  # a model is cut into about so many
ENOUGH_SLOTS, ENOUGH_BYTES = 24, 8 << 20  # of a window: it needs not be larger than both
WINDOW_SHARE = 8  # the window may take this part of what weights have
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Cuttable:
    """A matrix as tiles of 16 rows; `read_bytes` of the file and `kept_bytes` of memory for each.

    Attributes:
        straight: the file has it tiled; else what is read has to be tiled before it is used.
        file_bytes: all bytes of the file, which end within the last tile.
        begins: where each tile begins in the file, and where the last one ends, if tiles are not of
            one size; then `read_bytes` and `kept_bytes` say nothing.
    """

    name: str
    tiles: int
    read_bytes: int
    kept_bytes: int
    file_bytes: int
    straight: bool
    begins: Sequence[int] = ()

    @property
    def all_bytes(self) -> int:
        """Bytes of all tiles in the file's form."""
        if self.begins:
            return self.begins[-1] - self.begins[0]
        return self.tiles * self.read_bytes

    def edges(self, n: int) -> list[int]:
        """Tiles that cut it in at most `n` runs of about equal bytes, none of them without any."""
        if not self.begins:
            return [self.tiles * i // n for i in range(n + 1)]
        begins, found = self.begins, [0]
        for i in range(1, n):
            tile = bisect.bisect_left(begins, begins[0] + self.all_bytes * i // n)
            if begins[found[-1]] < begins[tile] < begins[-1]:
                found.append(tile)
        return [*found, self.tiles]

    def piece(self, first: int, last: int) -> Piece:
        """The tiles from `first` to before `last`."""
        n = last - first
        if self.begins:
            start = self.begins[first]
            size = self.begins[last] - start
            return Piece(self.name, first, n, start, size, size, size, self.straight)
        start, end = first * self.read_bytes, min(last * self.read_bytes, self.file_bytes)
        room, kept = n * self.read_bytes, n * self.kept_bytes
        return Piece(self.name, first, n, start, end - start, room, kept, self.straight)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tiles of a matrix; `start` is where they begin in its bytes of the file."""

    matrix: str
    tile: int
    tiles: int
    start: int
    read_bytes: int
    room_bytes: int  # of whole tiles in the file's form
    kept_bytes: int
    straight: bool


@dataclass(frozen=True)
class Residency:
    """What is kept, in the order of how long it stays when memory shrinks, and what is streamed.

    `streamed` is in the order of a pass; its length is a multiple of `slots`, so that a piece has
    the same slot in every pass.
    """

    kept: tuple[Piece, ...]
    streamed: tuple[Piece, ...]
    slots: int
    slot_bytes: int
    staging_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Memory of what stays."""
        return sum(piece.kept_bytes for piece in self.kept)

    @property
    def window_bytes(self) -> int:
        """Memory of the slots and of what is tiled from them."""
        return slots_bytes(self.slots, self.slot_bytes) + 2 * self.staging_bytes

    @property
    def staged_bytes(self) -> int:
        """Bytes of memory's form that each pass tiles anew."""
        return sum(piece.kept_bytes for piece in self.streamed if not piece.straight)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the file that each pass reads."""
        return sum(piece.read_bytes for piece in self.streamed)


def cut(matrices: Sequence[Cuttable]) -> list[Piece]:
    """Pieces of about equal bytes, in the order of the matrices."""
    total = sum(m.all_bytes for m in matrices)
    aim = max(min(total // PIECES, USUAL_PIECE_BYTES), LEAST_PIECE_BYTES, total // MOST_PIECES)
    pieces = []
    for m in matrices:
        edges = m.edges(min(m.tiles, max(1, round(m.all_bytes / aim))))
        pieces += [m.piece(first, last) for first, last in itertools.pairwise(edges)]
    return pieces


def slot_bytes_of(pieces: Sequence[Piece]) -> int:
    """Bytes of a slot for any of these: whole pages, with what direct reads take more."""
    largest = max((piece.room_bytes for piece in pieces), default=0)
    return -(-largest // PAGE) * PAGE + 2 * PAGE


def slots_bytes(n_slots: int, slot_bytes: int) -> int:
    """Memory of the slots of a window: whole huge pages."""
    return -(-n_slots * slot_bytes // HUGE_PAGE) * HUGE_PAGE


def staging_bytes_of(pieces: Sequence[Piece]) -> int:
    """Bytes of a buffer that pieces of other people's files are tiled in."""
    return max((piece.kept_bytes for piece in pieces if not piece.straight), default=0)


def least_bytes(pieces: Sequence[Piece]) -> int:
    """The smallest budget with which `keep` finds a residency."""
    slot, staging = slot_bytes_of(pieces), staging_bytes_of(pieces)
    order = spread(pieces)
    return min(
        slots_bytes(slots, slot)
        + 2 * staging
        + sum(pieces[i].kept_bytes for i in order[: len(pieces) % slots])
        for slots in range(LEAST_SLOTS, min(MOST_SLOTS, len(pieces)) + 1)
    )


def spread(pieces: Sequence[Piece]) -> list[int]:
    """Indices in an order of which any beginning is spread evenly over the pass."""
    return sorted(range(len(pieces)), key=lambda i: i * _GOLDEN % 1.0)


def keep(
    pieces: Sequence[Piece], budget: int, window_share: int = WINDOW_SHARE
) -> Residency | None:
    """The residency that keeps most within `budget` bytes, and streams the rest.

    The window takes one part in `window_share` of the budget at most, if it can be that small. None
    where not even the least fits, or there is nothing to stream.
    """
    if len(pieces) < LEAST_SLOTS:
        return None
    slot, staging = slot_bytes_of(pieces), staging_bytes_of(pieces)
    order = spread(pieces)
    sums = [0]
    for i in order:
        sums.append(sums[-1] + pieces[i].kept_bytes)
    window = min(max(ENOUGH_SLOTS * slot, ENOUGH_BYTES), budget // window_share) // slot
    window = min(max(window, LEAST_SLOTS), MOST_SLOTS)

    def best_of(numbers: range) -> tuple[int, int]:
        """The most pieces that can be kept, and with how many slots."""
        best = -1, 0
        for slots in numbers:
            left = budget - slots_bytes(slots, slot) - 2 * staging
            n = min(_most(sums, left), len(pieces) - slots)
            while n >= 0 and (len(pieces) - n) % slots:
                n -= 1
            best = max(best, (n, slots))
        return best

    best = best_of(range(max(LEAST_SLOTS, window * 3 // 4), window + 1))
    if best[0] < 0:
        best = best_of(range(LEAST_SLOTS, MOST_SLOTS + 1))
    if best[0] < 0:
        return None
    n, slots = best
    kept = set(order[:n])
    return Residency(
        tuple(pieces[i] for i in order[:n]),
        tuple(piece for i, piece in enumerate(pieces) if i not in kept),
        slots, slot, staging,
    )  # fmt: skip


def _most(sums: Sequence[int], budget: int) -> int:
    """The most pieces of a prefix that fit; -1 if not even none does."""
    return bisect.bisect_right(sums, budget) - 1
