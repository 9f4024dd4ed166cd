"""Ways to read a file from flash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ReadMode:
    """How readers read.

    Attributes:
        direct: past the system's cache.
        readers: threads, and so requests in flight.
        drop: tell the system's cache to forget what has been read.
    """

    direct: bool
    readers: int
    drop: bool

    def __str__(self) -> str:
        how = "direct" if self.direct else "buffered"
        return f"{how}, {self.readers} in flight"


# The first that comes within a tenth of the fastest is taken: more requests in flight bear it
# better when the CPU is busy, and reads past the cache leave it to other programs.
MODES = (
    ReadMode(direct=True, readers=8, drop=False),
    ReadMode(direct=True, readers=16, drop=False),
    ReadMode(direct=True, readers=4, drop=False),
    ReadMode(direct=False, readers=4, drop=True),
    ReadMode(direct=False, readers=2, drop=True),
)
GOOD_SHARE = 0.9


def choose(rates: Mapping[ReadMode, float]) -> ReadMode:
    """The mode to read in, by bytes per second of each."""
    best = max(rates.values())
    return next(mode for mode, rate in rates.items() if rate >= GOOD_SHARE * best)
