"""Ways to read a file from flash."""

from __future__ import annotations

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


MODES = (
    ReadMode(direct=True, readers=4, drop=False),
    ReadMode(direct=True, readers=8, drop=False),
    ReadMode(direct=False, readers=2, drop=True),
    ReadMode(direct=False, readers=4, drop=True),
)
