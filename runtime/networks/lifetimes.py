"""Places in one piece of memory for values that live one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNED = 64


@dataclass(frozen=True, slots=True)
class Life:
    """From the step that makes a value to the last one that needs it, both included."""

    n_bytes: int
    first: int
    last: int

    def meets(self, other: Life) -> bool:
        """Whether both are there at some step."""
        return self.first <= other.last and other.first <= self.last


def placed(lives: Mapping[str, Life]) -> tuple[dict[str, int], int]:
    """Offsets so that no two values that meet overlap, and the bytes of all.

    The largest first, each as low as it can be; or those first that are there for longer than
    others, under which these come and go, if that takes less.
    """
    sizes = sorted(lives, key=lambda name: (-lives[name].n_bytes, name))
    found = _placed_in_turn(lives, sizes)
    if found[1] <= least_bytes(lives):
        return found
    times = sorted(sizes, key=lambda name: lives[name].first - lives[name].last)
    return min(found, _placed_in_turn(lives, times), key=lambda one: one[1])


def _placed_in_turn(lives: Mapping[str, Life], names: Sequence[str]) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    at_step: dict[int, list[str]] = {}
    total = 0
    for name in names:
        life = lives[name]
        steps = range(life.first, life.last + 1)
        others = {other for step in steps for other in at_step.get(step, ())}
        for step in steps:
            at_step.setdefault(step, []).append(name)
        taken = sorted(
            (offsets[other], offsets[other] + _rounded(lives[other].n_bytes)) for other in others
        )
        at = 0
        for begin, end in taken:
            if at + _rounded(life.n_bytes) <= begin:
                break
            at = max(at, end)
        offsets[name] = at
        total = max(total, at + _rounded(life.n_bytes))
    return offsets, total


def least_bytes(lives: Mapping[str, Life]) -> int:
    """The most that are alive at one step: no placement takes less."""
    changes: dict[int, int] = {}
    for life in lives.values():
        changes[life.first] = changes.get(life.first, 0) + _rounded(life.n_bytes)
        changes[life.last + 1] = changes.get(life.last + 1, 0) - _rounded(life.n_bytes)
    live = most = 0
    for _, change in sorted(changes.items()):
        live += change
        most = max(most, live)
    return most


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNED) * ALIGNED
