"""Gradients of layers of real numbers, as calls of kernels.

Of a convolution's weights they are the product of its windows, transposed where they lie, and the
gradient of what it makes. Of what it reads they are a convolution of that gradient with the weights
turned round. A stride s makes s * s such convolutions of some of the taps each, for pixels s apart
(Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 1609.07009): zeros
between pixels are not multiplied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import UnsupportedError
from headrace.micro.half.convolution import geometry_of
from headrace.micro.half.depthwise import suits_down
from headrace.micro.half.windows import WHOLE, Geometry, Tile, bands, only_near
from headrace.micro.kernels import depthwise, depthwise_gradient, matmul, pad, pool, turn
from headrace.micro.kernels.numbers import Kind, dtype_of
from headrace.micro.lowered import SCRATCH, At, Lowered, Step
from headrace.micro.network import Convolution, Depthwise, Layer, Pool, Windows

_ALIGNED = 16


def zeros_of(n: int) -> str:
    """The name of so many zeros among constants."""
    return f"{n} zeros"


def ones_of(n: int) -> str:
    """The same of ones."""
    return f"{n} ones"


def _zeros(n: int, kind: Kind) -> dict[str, np.ndarray]:
    return {zeros_of(n): np.zeros(n, dtype_of(kind))}


def cleared(to: At, n_bytes: int, kind: Kind) -> Step:
    """Zeros, with up to 16 bytes behind them."""
    return Step(pad.NAMES[kind], tuple(pad.slots(to, to, 0, 0, 0, (n_bytes, 0), (1, 0))))


def bias_gradient(layer: Convolution | Depthwise, kind: Kind, dy: At, db: At) -> Lowered:
    """Sums of the gradients of all pixels, in order."""
    size, (rows, columns, made) = dtype_of(kind).itemsize, layer.makes.image
    block = matmul.Product(
        At(ones_of(1)), dy, db, At(zeros_of(made)), n=1, k=rows * columns, m=made, a_row=size,
        a_step=0, b_row=made * size, c_row=made * size,
    )  # fmt: skip
    constants = {ones_of(1): np.ones(1, dtype_of(kind)), **_zeros(made, kind)}
    return Lowered((Step(matmul.NAMES[kind], block.slots),), constants)


def _whole(n: int, kind: Kind, most: int) -> int:
    """How much scratch: a sum that is continued has whole vectors."""
    return most if n % (16 // dtype_of(kind).itemsize) == 0 else 1 << 30


def weight_gradient(
    layer: Convolution | Depthwise, kind: Kind, x: At, dy: At, dw: At,
    tile: Tile = WHOLE,
) -> Lowered:  # fmt: skip
    """Products of windows and of what was made of them, added up over pixels in order."""
    only_near(layer, layer.windows)
    size, of, made = dtype_of(kind).itemsize, geometry_of(layer), layer.makes.image[2]
    channels, (lines, taps) = of.image[2], layer.windows.taps
    (down, across), (further, aside) = layer.windows.strides, layer.windows.dilations
    parts, scratch = bands(of, x, kind, most=_whole(made, kind, tile.scratch))
    steps: list[Step] = []
    for band in parts:
        errors = At(dy.name, dy.offset + band.first * of.made[1] * made * size)
        rows = band.last - band.first
        if isinstance(layer, Depthwise):
            step = Step(
                depthwise_gradient.NAMES[kind],
                depthwise_gradient.Gradient(
                    band.at, errors, dw, rows, of.made[1], channels, lines, taps,
                    aside * channels * size, further * band.row, across * channels * size,
                    down * band.row, made * size, of.made[1] * made * size, band.first > 0,
                    made * size,
                ).slots,
            )  # fmt: skip
            steps += [*band.steps, step]
            continue
        for line in range(lines):
            # A line of taps at a time: what a step touches is smaller.
            a = At(band.at.name, band.at.offset + line * further * band.row)
            steps += band.steps if line == 0 else ()
            for first, last in tile.columns_of(made):
                place = (line * taps * channels * made + first) * size
                c = At(dw.name, dw.offset + place)
                block = matmul.Product(
                    a, At(errors.name, errors.offset + first * size), c,
                    c if band.first else At(zeros_of(made)),
                    n=taps * channels, k_lines=rows, k=of.made[1], m=last - first, a_row=size,
                    a_step=across * channels * size, a_k_line=down * band.row, b_row=made * size,
                    c_row=made * size, start_row=made * size if band.first else 0,
                )  # fmt: skip
                steps.append(Step(matmul.NAMES[kind], block.merged.slots))
    return Lowered(tuple(steps), _zeros(made, kind), scratch)


@dataclass(frozen=True)
class Phase:
    """Pixels of an axis that are a stride apart, and the taps that they come from.

    Attributes:
        first, count: the first pixel, and how many.
        taps: in the order in which their gradients lie.
        apart, pad: of these, as of windows.
    """

    first: int
    count: int
    taps: tuple[int, ...]
    apart: int
    pad: int


def phases(layer: Layer, windows: Windows, image: tuple[int, int, int]) -> list[list[Phase]]:
    """Those of rows and of columns.

    Raises:
        UnsupportedError: pads are larger than windows.
    """
    found = []
    for axis in (0, 1):
        taps, stride, dilation = windows.taps[axis], windows.strides[axis], windows.dilations[axis]
        here = []
        for first in range(min(stride, image[axis])):
            at = first + windows.pads[axis]
            own = [r for r in range(taps) if (at - r * dilation) % stride == 0][::-1]
            begin = -((at - own[0] * dilation) // stride) if own else 0
            if begin < 0:
                raise UnsupportedError(
                    f"{layer.name}: no gradient of what it reads is done where pads are larger "
                    f"than windows ({windows.pads} and {windows.taps})"
                )
            apart = dilation // math.gcd(stride, dilation)
            count = -(-(image[axis] - first) // stride)
            here.append(Phase(first, count, tuple(own), apart, begin))
        found.append(here)
    return found


def input_gradient(
    layer: Convolution | Depthwise, kind: Kind, dy: At, weights: At, dx: At,
    tile: Tile = WHOLE,
) -> Lowered:  # fmt: skip
    """Convolutions of the gradient of what a layer makes with its weights turned round."""
    size, of = dtype_of(kind).itemsize, geometry_of(layer)
    rows, columns, channels = of.image
    made, start = layer.makes.image[2], At(zeros_of(channels))
    steps: list[Step] = []
    scratch, (down, across) = 0, layer.windows.strides
    by_axis = phases(layer, layer.windows, of.image)
    if not all(phase.taps for axis in by_axis for phase in axis):
        steps.append(cleared(dx, rows * columns * channels * size, kind))
    for row in by_axis[0]:
        for column in by_axis[1]:
            if not row.taps or not column.taps:
                continue
            windows = Windows(
                (len(row.taps), len(column.taps)), (1, 1), (row.pad, column.pad),
                (row.apart, column.apart),
            )  # fmt: skip
            only_near(layer, windows)
            seen = Geometry(layer.makes.image, (row.count, column.count), windows)
            pixel = channels * size
            part = _Part(
                seen, dy, weights,
                At(dx.name, dx.offset + (row.first * columns + column.first) * pixel), start,
                across * pixel, down * columns * pixel, row.taps, column.taps,
            )  # fmt: skip
            more = _dense if isinstance(layer, Convolution) else _by_channel
            added, needed = more(layer, part, kind, tile, made, channels)
            steps += added
            scratch = max(scratch, needed)
    return Lowered(tuple(steps), _zeros(channels, kind), scratch)


@dataclass(frozen=True)
class _Part:
    """A convolution for some of the pixels; c_pixel and c_row are bytes from one to the next."""

    seen: Geometry
    dy: At
    weights: At
    c: At
    start: At
    c_pixel: int
    c_row: int
    lines: tuple[int, ...]
    taps: tuple[int, ...]

    def tap_of(self, layer: Any, matrix: int) -> tuple[At, int, int]:
        """The first tap's weights, and bytes from line to line and from tap to tap."""
        lines, taps = (_step(one) for one in (self.lines, self.taps))
        wide = layer.windows.taps[1]
        first = (self.lines[0] * wide + self.taps[0]) * matrix
        at = At(self.weights.name, self.weights.offset + first)
        return at, lines * wide * matrix, taps * matrix


def _step(taps: tuple[int, ...]) -> int:
    return taps[1] - taps[0] if len(taps) > 1 else 0


def _by_channel(
    layer: Any, part: _Part, kind: Kind, tile: Tile, made: int, channels: int
) -> tuple[list[Step], int]:
    size, steps = dtype_of(kind).itemsize, []
    parts, scratch = bands(part.seen, part.dy, kind, most=tile.scratch)
    weights, line, tap = part.tap_of(layer, channels * size)
    (further, aside), pixel = part.seen.windows.dilations, channels * size
    for band in parts:
        block = depthwise.Convolved(
            band.at, weights, part.start, At(part.c.name, part.c.offset + band.first * part.c_row),
            band.last - band.first, part.seen.made[1], channels, len(part.lines), len(part.taps),
            aside * pixel, further * band.row, tap, line, pixel, band.row, part.c_pixel, part.c_row,
        )  # fmt: skip
        block = block.turned if suits_down(part.seen.made) else block
        steps += [*band.steps, Step(depthwise.NAMES[kind], block.slots)]
    return steps, scratch


def _dense(
    layer: Any, part: _Part, kind: Kind, tile: Tile, made: int, channels: int
) -> tuple[list[Step], int]:
    """Some of the channels at a time, so that the turned weights are few."""
    size, steps = dtype_of(kind).itemsize, []
    parts, held = bands(part.seen, part.dy, kind, most=tile.scratch)
    held = -(-held // _ALIGNED) * _ALIGNED
    weights, line, tap = part.tap_of(layer, channels * made * size)
    count = len(part.lines) * len(part.taps) * made
    two = 32 // size  # two vectors
    fits = max(two, tile.scratch // (count * size) // two * two)
    at_once = min(channels, tile.columns or fits)
    turned = At(SCRATCH, held)
    for first in range(0, channels, at_once):
        n = min(at_once, channels - first)
        source = At(weights.name, weights.offset + first * made * size)
        steps.append(
            Step(
                turn.NAMES[kind],
                turn.Turned(
                    source, turned, len(part.lines), len(part.taps), n, made, line, tap,
                    made * size,
                ).slots,
            )
        )  # fmt: skip
        for band in parts:
            c = At(part.c.name, part.c.offset + band.first * part.c_row + first * size)
            block = matmul.Product(
                band.at, turned, c, part.start, lines=band.last - band.first,
                n=part.seen.made[1], k_lines=len(part.lines), k=len(part.taps) * made, m=n,
                a_row=made * size, a_step=size, a_line=band.row,
                a_k_line=part.seen.windows.dilations[0] * band.row, b_row=n * size,
                c_row=part.c_pixel, c_line=part.c_row,
            )  # fmt: skip
            again = first == 0 or len(parts) > 1
            steps += [*(band.steps if again else ()), Step(matmul.NAMES[kind], block.merged.slots)]
    return steps, held + count * at_once * size + _ALIGNED


def pool_gradient(layer: Pool, kind: Kind, x: At, y: At, dy: At, dx: At) -> Lowered:
    """Zeros, and then every window's gradient to its pixels."""
    n_bytes = layer.reads[0].elements * dtype_of(kind).itemsize
    slots = pool.slots(
        x, y, dx, dy, layer.reads[0].image, layer.makes.image[:2], layer.windows, layer.bounds
    )
    name = pool.name_of(layer.kind, kind, gradient=True)
    return Lowered((cleared(dx, n_bytes, kind), Step(name, tuple(slots))))
