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


# The first that comes within a tenth of the best is taken: more requests in flight bear it better
# when the CPU is busy, and reads past the cache leave it to other programs.
MODES = (
    ReadMode(direct=True, readers=8, drop=False),
    ReadMode(direct=True, readers=16, drop=False),
    ReadMode(direct=True, readers=4, drop=False),
    ReadMode(direct=False, readers=4, drop=True),
    ReadMode(direct=False, readers=2, drop=True),
)
GOOD_SHARE = 0.9
# What reading takes more than at the measured rate, as others are at work beside it.
FLASH_SHARE = 0.95


@dataclass(frozen=True)
class FlashRate:
    """What reading in a mode gives, and what it takes from whoever computes.

    Attributes:
        bytes_s: bytes per second.
        cpu_s: seconds of CPU for each byte: reads through the system's cache are copied.
    """

    bytes_s: float
    cpu_s: float


@dataclass(frozen=True)
class Work:
    """A pass: bytes that are read, while `threads` of `cores` compute for `compute_s` seconds."""

    n_bytes: int
    compute_s: float
    threads: int
    cores: int

    def seconds(self, rate: FlashRate) -> float:
        """What the pass takes: reading, computing or the CPU for both, whichever is longest."""
        cpu_s = self.compute_s * self.threads + rate.cpu_s * self.n_bytes
        return max(self.flash_s(rate), self.compute_s, cpu_s / self.cores)

    def flash_s(self, rate: FlashRate) -> float:
        """What reading alone takes."""
        return self.n_bytes / (rate.bytes_s * FLASH_SHARE)


def choose(rates: Mapping[ReadMode, FlashRate], work: Work) -> ReadMode:
    """The mode to read in for a pass."""
    times = {mode: work.seconds(rate) for mode, rate in rates.items()}
    best = min(times.values())
    return next(mode for mode, seconds in times.items() if seconds * GOOD_SHARE <= best)
