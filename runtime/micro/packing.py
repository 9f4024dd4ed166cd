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
from functools import partial
from typing import NamedTuple

ALIGNED = 16
_TRIES = 400


class Life(NamedTuple):
    """Bytes of a piece, from `begin` to `end`, that are taken in these steps, both included."""

    begin: int
    end: int
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


def packed(pieces: Mapping[str, Lives], tries: int = _TRIES) -> Packing:
    """Offsets at multiples of `ALIGNED` so that nothing overlaps at any step.

    Args:
        tries: changes of the best order, at most.
    """
    meeting = _meeting(pieces)
    orders = {
        packer: sorted(pieces, key=lambda name: (*key(pieces[name]), name))
        for packer, key in _ORDERS.items()
    }
    orders["by breadth"] = _by_breadth(pieces)
    found = [(*_in_turn(pieces, meeting, order), packer) for packer, order in orders.items()]
    offsets, total, packer = min(found, key=lambda one: one[1])
    least = _least(pieces)
    if total > least:
        offsets, changed = _changed(
            partial(_in_turn, pieces, meeting),
            {name: _bytes(own) for name, own in pieces.items()},
            orders[packer],
            (offsets, total),
            least,
            tries,
        )
        packer, total = (f"{packer}, changed", changed) if changed < total else (packer, total)
    return Packing(offsets, total, least, packer)


def _bytes(lives: Lives) -> int:
    return max(life.end for life in lives)


def _first(lives: Lives) -> int:
    return min(life.first for life in lives)


def _last(lives: Lives) -> int:
    return max(life.last for life in lives)


def _least(pieces: Mapping[str, Lives]) -> int:
    times = sorted({t for lives in pieces.values() for life in lives for t in life[2:]})
    return max((sum(_alive(lives, time) for lives in pieces.values()) for time in times), default=0)


def _alive(lives: Lives, time: int) -> int:
    """Bytes of a piece that are taken at a step."""
    total = end = 0
    for life in sorted(life for life in lives if life.first <= time <= life.last):
        total += max(0, life.end - max(end, life.begin))
        end = max(end, life.end)
    return total


_Meeting = Mapping[str, Mapping[str, list[tuple[int, int]]]]


def _meeting(pieces: Mapping[str, Lives]) -> _Meeting:
    """Of each piece those that it meets, and how far above these it may not begin, from and to."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {name: {} for name in pieces}
    for name, own in pieces.items():
        for other, others in pieces.items():
            bad = [
                (theirs.begin - mine.end + 1, theirs.end - mine.begin)
                for mine in own
                for theirs in others
                if mine.first <= theirs.last and theirs.first <= mine.last
            ]
            if bad and name != other:
                found[name][other] = bad
    return found


def _in_turn(
    pieces: Mapping[str, Lives], meeting: _Meeting, order: Sequence[str]
) -> tuple[dict[str, int], int]:
    """Each as low as those before it let it be."""
    offsets: dict[str, int] = {}
    total = 0
    for name in order:
        bad = sorted(
            (offsets[other] + begin, offsets[other] + end)
            for other, spans in meeting[name].items()
            if other in offsets
            for begin, end in spans
        )
        at = 0
        for begin, end in bad:
            if begin <= at < end:
                at = -(-end // ALIGNED) * ALIGNED
        offsets[name] = at
        total = max(total, at + _bytes(pieces[name]))
    return offsets, total


def _by_breadth(pieces: Mapping[str, Lives]) -> list[str]:
    """Pieces of the step with most alive first, the largest of them first."""
    alive: dict[int, list[tuple[int, str]]] = {}
    for name, lives in pieces.items():
        for life in lives:
            for step in range(life.first, life.last + 1):
                alive.setdefault(step, []).append((life.begin - life.end, name))
    widest = sorted(alive, key=lambda step: (sum(n for n, _ in alive[step]), step))
    return list(dict.fromkeys(name for step in widest for _, name in sorted(alive[step])))


def _changed(
    place: Callable[[Sequence[str]], tuple[dict[str, int], int]], sizes: Mapping[str, int],
    order: Sequence[str], found: tuple[dict[str, int], int], least: int, tries: int,
) -> tuple[dict[str, int], int]:  # fmt: skip
    """Let those that end too high be placed earlier, or any other one elsewhere in turn."""
    rng = random.Random(0)
    for i in range(tries):
        if found[1] <= least:
            break
        other, offsets = list(order), found[0]
        high = [name for name in order if offsets[name] + sizes[name] > least]
        name = rng.choice(high if i % 4 else other)
        at = other.index(name)
        other.remove(name)
        other.insert(rng.randrange(at + 1 if i % 4 else len(order)), name)
        tried = place(other)
        if tried[1] <= found[1]:
            order, found = other, tried
    return found
