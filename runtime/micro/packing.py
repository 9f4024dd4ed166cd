"""Places for a microcontroller's values: the best of several packers, and then by exchanges.

There are few values and every byte counts, so that more is tried than for networks of a PC
(`headrace.networks.lifetimes`): the orders that greedy packers take (Pisarchyk and Lee, "Efficient
Memory Management for Deep Neural Net Inference", 2020), and changes of the best order, until
nothing takes less or the least possible is reached. The same values give the same places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ALIGNED = 16
_TRIES = 400


class Life(NamedTuple):
    """Bytes that are taken from a step to another, both included."""

    n_bytes: int
    first: int
    last: int


Lives = tuple[Life, ...]  # of one piece, which begins at one place all the time


@dataclass(frozen=True)
class Packing:
    """Where values lie.

    Attributes:
        offsets: by name.
        n_bytes: up to the end of the last one.
        least: bytes that are alive at one step: no places take less.
        packer: which found it.
    """

    offsets: dict[str, int]
    n_bytes: int
    least: int
    packer: str


_ORDERS: dict[str, Callable[[Lives], tuple[int, ...]]] = {
    "by size": lambda lives: (-_bytes(lives), _first(lives)),
    "by duration": lambda lives: (_first(lives) - _last(lives), -_bytes(lives)),
    "by size and duration": lambda lives: (
        -_bytes(lives) * (_last(lives) - _first(lives) + 1), _first(lives),
    ),
    "by begin": lambda lives: (_first(lives), -_bytes(lives)),
    "by end": lambda lives: (-_last(lives), -_bytes(lives)),
}  # fmt: skip


def packed(pieces: Mapping[str, Lives]) -> Packing:
    """Offsets at multiples of `ALIGNED` so that nothing overlaps at any step."""
    orders = {
        packer: sorted(pieces, key=lambda name: (*key(pieces[name]), name))
        for packer, key in _ORDERS.items()
    }
    orders["by breadth"] = _by_breadth(pieces)
    found = [(*_in_turn(pieces, order), packer) for packer, order in orders.items()]
    offsets, total, packer = min(found, key=lambda one: one[1])
    least = _least(pieces)
    if total > least:
        offsets, changed = _exchanged(pieces, orders[packer], offsets, total, least)
        packer, total = (f"{packer}, changed", changed) if changed < total else (packer, total)
    return Packing(offsets, total, least, packer)


def _bytes(lives: Lives) -> int:
    return max(life.n_bytes for life in lives)


def _first(lives: Lives) -> int:
    return min(life.first for life in lives)


def _last(lives: Lives) -> int:
    return max(life.last for life in lives)


def _least(pieces: Mapping[str, Lives]) -> int:
    changes: dict[int, int] = {}
    for lives in pieces.values():
        for life in lives:
            changes[life.first] = changes.get(life.first, 0) + life.n_bytes
            changes[life.last + 1] = changes.get(life.last + 1, 0) - life.n_bytes
    live = most = 0
    for _, change in sorted(changes.items()):
        live += change
        most = max(most, live)
    return most


def _in_turn(pieces: Mapping[str, Lives], order: Sequence[str]) -> tuple[dict[str, int], int]:
    """Each as low as those before it let it be."""
    offsets: dict[str, int] = {}
    for name in order:
        # Places where it would overlap: from the first byte up to the last one, not included.
        bad = sorted(
            (offsets[other] - mine.n_bytes + 1, offsets[other] + theirs.n_bytes)
            for other in offsets
            for theirs in pieces[other]
            for mine in pieces[name]
            if mine.first <= theirs.last and theirs.first <= mine.last
        )
        at = 0
        for begin, end in bad:
            if at >= begin and at < end:
                at = -(-end // ALIGNED) * ALIGNED
        offsets[name] = at
    return offsets, max((at + _bytes(pieces[name]) for name, at in offsets.items()), default=0)


def _by_breadth(pieces: Mapping[str, Lives]) -> list[str]:
    """Pieces of the step with most alive first, the largest of them first."""
    alive: dict[int, list[tuple[int, str]]] = {}
    for name, lives in pieces.items():
        for life in lives:
            for step in range(life.first, life.last + 1):
                alive.setdefault(step, []).append((-life.n_bytes, name))
    widest = sorted(alive, key=lambda step: (sum(n for n, _ in alive[step]), step))
    return list(dict.fromkeys(name for step in widest for _, name in sorted(alive[step])))


def _exchanged(
    pieces: Mapping[str, Lives], order: Sequence[str], offsets: dict[str, int], total: int,
    least: int,
) -> tuple[dict[str, int], int]:  # fmt: skip
    rng = random.Random(0)
    for _ in range(_TRIES):
        if total <= least:
            break
        other = list(order)
        name = other.pop(rng.randrange(len(other)))
        other.insert(rng.randrange(len(other) + 1), name)
        tried, needed = _in_turn(pieces, other)
        if needed <= total:
            order, offsets, total = other, tried, needed
    return offsets, total
