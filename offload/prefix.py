"""Weights with an order of worth: the first stay in memory, the rest is read for every pass.

The blocks of a stack (`headrace.stack`) are such. What of a matrix is read must lie in the window
together, as long chunks are multiplied by the sum of its blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.offload.pieces import (
    ENOUGH_BYTES,
    ENOUGH_SLOTS,
    MOST_SLOTS,
    WINDOW_SHARE,
    Piece,
    Residency,
    slot_bytes_of,
    slots_bytes,
)

_AHEAD = 2  # slots, at least, in which is read while those of a matrix are used
_TRIED = 16  # numbers of slots, from the least on: one of them divides what streams


@dataclass(frozen=True)
class Ranked:
    """Pieces in their order of worth.

    Attributes:
        turns: of each the place in a pass.
        groups: of each the matrix.
        least: how many must stay.
    """

    pieces: tuple[Piece, ...]
    turns: tuple[int, ...]
    groups: tuple[int, ...]
    least: int

    @property
    def slot_bytes(self) -> int:
        """Of the window."""
        return slot_bytes_of(self.pieces)


def keep_first(ranked: Ranked, budget: int) -> Residency | None:
    """The residency that keeps most of the first pieces in `budget` bytes, and streams the rest.

    None where not even the least fits.
    """
    slot = ranked.slot_bytes
    wanted = min(max(ENOUGH_SLOTS * slot, ENOUGH_BYTES), budget // WINDOW_SHARE) // slot
    for at_least in (min(wanted, MOST_SLOTS), 0):
        found = (
            (count, slots) for count, slots, n_bytes in _ways(ranked, at_least) if n_bytes <= budget
        )
        count, slots = max(found, default=(0, 0))
        if count:
            return _residency(ranked, count, slots)
    return None


def least_bytes(ranked: Ranked) -> int | None:
    """The smallest budget with which `keep_first` finds a residency; None: there is none."""
    return min((n_bytes for _, _, n_bytes in _ways(ranked, 0)), default=None)


def _ways(ranked: Ranked, at_least: int) -> Iterator[tuple[int, int, int]]:
    """How many pieces may stay, with how many slots, and the bytes of both."""
    n, slot = len(ranked.pieces), ranked.slot_bytes
    kept = sum(piece.kept_bytes for piece in ranked.pieces)
    missing = Counter[int]()
    most = 0
    for count in range(n - 1, ranked.least - 1, -1):
        kept -= ranked.pieces[count].kept_bytes
        group = ranked.groups[count]
        missing[group] += 1
        most = max(most, missing[group])
        streamed, least = n - count, max(most + _AHEAD, at_least)
        for slots in range(least, min(least + _TRIED, MOST_SLOTS + 1)):
            if streamed % slots == 0:
                yield count, slots, kept + slots_bytes(slots, slot)
                break


def _residency(ranked: Ranked, count: int, slots: int) -> Residency:
    order = sorted(range(count, len(ranked.pieces)), key=lambda i: ranked.turns[i])
    streamed: Sequence[Piece] = [ranked.pieces[i] for i in order]
    return Residency(ranked.pieces[:count], tuple(streamed), slots, ranked.slot_bytes, 0)
