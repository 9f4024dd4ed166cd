"""Sizes of convolutions and pools, as kernels have them.

Slots from `GEOMETRY` on: 0 images, 1 and 2 rows and columns of what is read, 3 and 4 of what is
written, 5 and 6 of taps, 7 and 8 strides, 9 and 10 pads above and to the left, 11 and 12 dilations,
13 bytes of a pixel that is read, 14 of one that is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import arg_int, larger, smaller

if TYPE_CHECKING:
    import numpy as np

GEOMETRY = 8
MOST = 1 << 48


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution, in pixels; pads are those above and to the left.

    Raises:
        ValueError: one is not below `MOST`, so that it might be taken for an address.
    """

    images: int
    read: tuple[int, int]
    written: tuple[int, int]
    taps: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        sizes = (*self.read, *self.taps, *self.strides, *self.pads, *self.dilations)
        if max(sizes) >= MOST:
            raise ValueError(f"{max(sizes)} pixels")

    def flat(self) -> Geometry:
        """The same where each pixel stands for itself, as one row, which needs no borders."""
        alone = self.taps == self.strides == (1, 1) and self.pads == (0, 0)
        if not alone or self.read != self.written:
            return self
        count = self.images * self.read[0] * self.read[1]
        return Geometry(1, (1, count), (1, count), (1, 1))

    @property
    def pixels(self) -> int:
        """That are written, of all images."""
        return self.images * self.written[0] * self.written[1]

    def slots(self, read_bytes: int, written_bytes: int) -> list[int]:
        """Of an argument block; bytes are of pixels."""
        return [
            self.images, *self.read, *self.written, *self.taps, *self.strides, *self.pads,
            *self.dilations, read_bytes, written_bytes,
        ]  # fmt: skip


def geometry_of(args: Any) -> Any:
    """The slots, in order, for a kernel to unpack."""
    return (
        arg_int(args, 8), arg_int(args, 9), arg_int(args, 10), arg_int(args, 11), arg_int(args, 12),
        arg_int(args, 13), arg_int(args, 14), arg_int(args, 15), arg_int(args, 16),
        arg_int(args, 17), arg_int(args, 18), arg_int(args, 19), arg_int(args, 20),
        arg_int(args, 21), arg_int(args, 22),
    )  # fmt: skip


def taps_inside(begin: Any, step: Any, taps: Any, size: Any) -> Any:
    """Of taps `step` apart from `begin` on, the first that is in the image, and how many are."""
    first = 0
    if begin < 0:
        first = (step - 1 - begin) // step
    behind = smaller(taps, larger(0, (size - begin + step - 1) // step))
    return first, behind - first


# --- reference and cases --------------------------------------------------------------------------


def reference(
    x: np.ndarray, w: np.ndarray, geometry: Geometry, *, depthwise: bool = False
) -> np.ndarray:
    """A convolution in float64, without bias.

    Args:
        x: [images, rows, columns, channels].
        w: [taps down, taps across, channels, channels written]; of `depthwise`, without the last.
    """
    import numpy as np

    (height, width), (rows, columns) = geometry.read, geometry.written
    out = np.zeros((len(x), rows, columns, w.shape[-1]))
    for ky in range(geometry.taps[0]):
        for kx in range(geometry.taps[1]):
            for oy in range(rows):
                iy = oy * geometry.strides[0] - geometry.pads[0] + ky * geometry.dilations[0]
                for ox in range(columns):
                    ix = ox * geometry.strides[1] - geometry.pads[1] + kx * geometry.dilations[1]
                    if 0 <= iy < height and 0 <= ix < width:
                        v = x[:, iy, ix].astype(np.float64)
                        out[:, oy, ox] += v * w[ky, kx] if depthwise else v @ w[ky, kx]
    return out


SHAPES: Sequence[tuple[Geometry, int, int]] = (  # channels read and written
    (Geometry(1, (1, 31), (1, 31), (1, 1)), 5, 40),
    (Geometry(2, (5, 17), (5, 17), (3, 3), pads=(1, 1)), 3, 16),
    (Geometry(1, (9, 33), (5, 17), (3, 3), (2, 2), (1, 1)), 16, 48),
    (Geometry(1, (4, 3), (4, 3), (5, 5), pads=(2, 2)), 32, 32),
    (Geometry(1, (9, 21), (5, 17), (3, 3), dilations=(2, 2)), 17, 20),
    (Geometry(1, (1, 1), (1, 1), (1, 1)), 64, 100),
)
