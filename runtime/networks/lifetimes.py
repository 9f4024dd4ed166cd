"""Places in one piece of memory for values that live one after the other."""

from __future__ import annotations

from collections.abc import Mapping
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

    The largest first, each as low as it can be.
    """
    offsets: dict[str, int] = {}
    total = 0
    for name, life in sorted(lives.items(), key=lambda pair: (-pair[1].n_bytes, pair[0])):
        taken = sorted(
            (offsets[other], offsets[other] + _rounded(lives[other].n_bytes))
            for other in offsets
            if lives[other].meets(life)
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
    steps = {life.first for life in lives.values()}
    return max(
        (
            sum(_rounded(one.n_bytes) for one in lives.values() if one.first <= at <= one.last)
            for at in steps
        ),
        default=0,
    )


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNED) * ALIGNED
