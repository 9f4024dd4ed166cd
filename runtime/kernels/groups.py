"""Groups of a convolution's channels, as kernels have them: behind geometry and endings."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.kernels.geometry import Geometry


@dataclass(frozen=True)
class Groups:
    """Tiles that read other channels than the next ones, or write to another place.

    Attributes:
        tiles: of a group.
        read: bytes from what one group reads to what the next one does.
        across: groups that write beside each other.
        apart: bytes between what these write, and what those below them write.
        row: bytes between rows that are written.
    """

    tiles: int
    read: int
    across: int
    apart: tuple[int, int]
    row: int

    def slots(self) -> list[int]:
        """Of an argument block."""
        return [self.tiles, self.read, self.across, *self.apart, self.row]


def one_group(tiles: int, geometry: Geometry, written_bytes: int) -> Groups:
    """All tiles read the same, and write side by side."""
    return Groups(max(1, tiles), 0, 1, (0, 0), geometry.written[1] * written_bytes)
