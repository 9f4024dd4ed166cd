"""Images with zeros around them, where windows reach beyond: some rows at a time, in scratch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.kernels import pad
from headrace.micro.kernels.numbers import Kind, dtype_of
from headrace.micro.lowered import SCRATCH, At, Step
from headrace.micro.network import Layer, Windows

MOST_SCRATCH = 16 << 10  # bytes of an image's rows with their zeros, at a time


_SCRATCH = At(SCRATCH)


@dataclass(frozen=True)
class Tile:
    """How much of a layer a kernel does at a time.

    Attributes:
        scratch: bytes of an image's rows with zeros around them, or of turned weights.
        columns: channels of a product; 0: all of them.
    """

    scratch: int = MOST_SCRATCH
    columns: int = 0

    def columns_of(self, m: int) -> list[tuple[int, int]]:
        """Ranges of channels."""
        step = self.columns or m
        return [(first, min(first + step, m)) for first in range(0, m, step)]


WHOLE = Tile()


@dataclass(frozen=True)
class Geometry:
    """What windows see of an image.

    Attributes:
        image: rows, columns and channels of it.
        made: rows and columns of what is made.
    """

    image: tuple[int, int, int]
    made: tuple[int, int]
    windows: Windows

    @property
    def spans(self) -> tuple[int, int]:
        """Rows and columns with zeros that all windows see."""
        of = self.windows
        return tuple(  # type: ignore[return-value]
            (made - 1) * stride + (taps - 1) * dilation + 1
            for made, stride, taps, dilation in zip(
                self.made, of.strides, of.taps, of.dilations, strict=True
            )
        )

    @property
    def needs_zeros(self) -> bool:
        """Whether a window reaches beyond the image."""
        seen = (
            span - before <= n
            for span, before, n in zip(self.spans, self.windows.pads, self.image, strict=False)
        )
        return self.windows.pads != (0, 0) or not all(seen)

    def padded(self, x: np.ndarray) -> np.ndarray:
        """The image with zeros; rows and columns that no window sees are left out."""
        (high, wide), (above, left) = self.spans, self.windows.pads
        found = np.zeros((high, wide, x.shape[2]), x.dtype)
        part = x[: high - above, : wide - left]
        found[above : above + part.shape[0], left : left + part.shape[1]] = part
        return found


@dataclass(frozen=True)
class Band:
    """Rows that are made at a time, of an image as windows see it.

    Attributes:
        first, last: the first row that is made, and the one behind the last.
        steps: what brings the image there.
        at: of the first window's first pixel.
        row: bytes from one row of it to the next.
    """

    first: int
    last: int
    steps: tuple[Step, ...]
    at: At
    row: int


def bands(
    of: Geometry, x: At, kind: Kind, scratch: At = _SCRATCH, most: int = MOST_SCRATCH
) -> tuple[list[Band], int]:
    """An image as windows see it, where it lies or with zeros around it in scratch.

    Args:
        x: address of the image.
        scratch: address of memory for copies.
        most: bytes of them; more where a row's windows need more.

    Returns:
        Bands in order, and the bytes of scratch.
    """
    rows, columns, channels = of.image
    pixel = channels * dtype_of(kind).itemsize
    if not of.needs_zeros:
        return [Band(0, of.made[0], (), x, columns * pixel)], 0
    (_, wide), (above, left) = of.spans, of.windows.pads
    row, stride = wide * pixel, of.windows.strides[0]
    reach = (of.windows.taps[0] - 1) * of.windows.dilations[0] + 1
    at_once = min(max(1, (most // row - reach) // stride + 1), of.made[0])
    held = min(columns, wide - left)
    found, scratch_bytes = [], 0
    for first in range(0, of.made[0], at_once):
        last = min(first + at_once, of.made[0])
        begin, end = first * stride - above, (last - 1) * stride - above + reach
        top, bottom = max(0, -begin), max(0, end - rows)
        inside = end - begin - top - bottom
        step = Step(
            pad.NAMES[kind],
            tuple(
                pad.slots(
                    At(x.name, x.offset + (begin + top) * columns * pixel), scratch, inside,
                    held * pixel, columns * pixel,
                    (left * pixel, (wide - left - held) * pixel), (top, bottom),
                )
            ),
        )  # fmt: skip
        found.append(Band(first, last, (step,), scratch, row))
        scratch_bytes = max(scratch_bytes, (end - begin) * row + pad.SLACK)
    return found, scratch_bytes


def only_near(layer: Layer, windows: Windows) -> None:
    """Refuse taps of a row that do not lie side by side."""
    if windows.dilations[1] != 1 and windows.taps[1] != 1:
        raise UnsupportedError(
            f"{layer.name}: windows whose columns are {windows.dilations[1]} apart have no kernel "
            "of real numbers; quantise the network, or change the layer's dilations to 1"
        )
