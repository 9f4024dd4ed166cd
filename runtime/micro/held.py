"""Values of a network where its graph is read: how the graph has what lies pixel by pixel here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.micro.network import Value

# The channels of images, and of rows, which are images of one row.
TO_FIRST, TO_LAST, ROWS_TURNED = (0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1)
Pads = tuple[tuple[int, int], tuple[int, int]]  # rows and columns of zeros: before, and behind
NO_PADS: Pads = ((0, 0), (0, 0))


def image_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, columns and channels of an image, or of a row, whose graph has channels first."""
    _, channels, *rows, columns = shape
    return (rows[0] if rows else 1), columns, channels


def pads_of(before: Sequence[int], after: Sequence[int]) -> Pads:
    """Pads of rows and columns; of a row only columns are there."""
    first, last = ([0] * (2 - len(one)) + [int(n) for n in one] for one in (before, after))
    return (first[0], first[1]), (last[0], last[1])


@dataclass(frozen=True)
class Held:
    """A graph's value, as a network has it.

    Attributes:
        first: the graph has its channels first.
        real: the graph has numbers, where the network has codes.
        flat: the graph has an image's elements as one row.
        pads: zeros that the graph has around the image.
    """

    value: Value
    first: bool = False
    real: bool = False
    flat: bool = False
    pads: Pads = NO_PADS

    @property
    def in_order(self) -> bool:
        """Whether elements lie as the graph has them."""
        rows, columns, channels = self.value.image
        moves = rows * columns != 1 and channels != 1
        return not moves or not (self.first or self.flat)

    def of_codes(self, value: Value | None = None) -> Held:
        """The same, or another value that lies so, where the graph has codes."""
        return replace(self, value=self.value if value is None else value, real=False)

    def of_numbers(self) -> Held:
        """The same where the graph has numbers."""
        return replace(self, real=True)

    def as_row(self) -> Held:
        """The same where the graph has one row of its elements, by channels."""
        return replace(self, flat=True, first=False)

    def padded(self, pads: Pads) -> Held:
        """The same where the graph has zeros around it."""
        return replace(self, pads=pads)

    def turned(self, first: bool) -> Held:
        """The same where the graph has put its channels elsewhere."""
        return replace(self, first=first)
