"""Zeros around what convolutions read, where finding the borders costs more than a copy.

Without borders all pixels of a row are computed eight at a time, and taps that lie side by side in
memory are one tap with more channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace.kernels.geometry import Geometry
from headrace.networks.operation import PADDED, Addresses, Image, Operation, Planes

_PER_CHANNEL = 16  # pixels of a row for each channel written, up to which a copy pays


def with_borders(
    operations: Sequence[Operation], images: Mapping[str, Image],
    planes: Mapping[str, tuple[str, Planes]],
) -> list[Operation]:  # fmt: skip
    """The operations, with copies of what some of them read.

    Args:
        planes: of values that are there as ONNX has them, what they are and which of its pixels;
            they are copied from there.
    """
    found: list[Operation] = []
    made: set[str] = set()
    pays = {
        id(one): one.geometry is not None and _pays(*one.geometry, images[one.makes])
        for one in operations
    }
    # What is added is read as a value of ours, even where what is convolved is not.
    gathered = {
        name for one in operations for name in (one.inputs if not pays[id(one)] else [one.adds])
    }
    for one in operations:
        if one.geometry is not None and pays[id(one)]:
            geometry, channels = one.geometry
            sizes, x = _bordered(geometry), one.reads[0]
            name = f"{x}/headrace/{sizes} from {geometry.pads}"
            if name not in made:
                plane = None if x in gathered else planes.get(x)
                found.append(_border(x, name, images[x], geometry, sizes, plane))
                made.add(name)
            one.reads = [name]
            one.steps[name] = channels * 4
            sides = replace(geometry, read=sizes, pads=(0, 0))
            if geometry.dilations[1] == 1:
                sides = replace(sides, taps=(sides.taps[0], 1))
                channels *= geometry.taps[1]
            one.geometry = sides, channels
        found.append(one)
    return found


_MOST_ADDED = 4  # times the pixels, of taps that are apart


def _pays(geometry: Geometry, channels: int, written: Image) -> bool:
    if geometry.taps == (1, 1):
        return False
    if max(geometry.dilations) > 1:
        whole, read = math.prod(_bordered(geometry)), math.prod(geometry.read)
        if whole > _MOST_ADDED * read:  # most taps are outside, and cost nothing
            return False
    few = channels < PADDED and geometry.taps[1] > 1 and geometry.dilations[1] == 1
    bordered = _bordered(geometry) != geometry.read or geometry.pads != (0, 0)
    return few or (bordered and geometry.written[1] <= _PER_CHANNEL * written.channels)


def _bordered(geometry: Geometry) -> tuple[int, int]:
    """Rows and columns with all that taps reach."""
    reach = [
        (out - 1) * stride + (taps - 1) * apart + 1
        for out, stride, taps, apart in zip(
            geometry.written, geometry.strides, geometry.taps, geometry.dilations, strict=True
        )
    ]
    sizes = [
        max(size + pad, most)
        for size, pad, most in zip(geometry.read, geometry.pads, reach, strict=True)
    ]
    return sizes[0], sizes[1]


def _border(
    x: str, made: str, read: Image, geometry: Geometry, sizes: tuple[int, int],
    plane: tuple[str, Planes] | None,
) -> Operation:  # fmt: skip
    count = geometry.images * sizes[0] * sizes[1] * read.channels

    def slots(one: Operation, at: Addresses) -> list[Any]:
        if plane is None:
            step, begin = one.step(x, read), at[x]
            steps = [step, 4, read.pixels * step, read.width * step]
        else:
            root, pixels = plane
            row, apart = pixels.steps
            steps = [4, apart, read.channels * apart, row]
            begin = at[root] + pixels.begin
        return [
            begin, at[made], geometry.images, *geometry.read, *sizes, *geometry.pads,
            read.channels, *steps,
        ]  # fmt: skip

    image = Image(1, 1, -(-count // PADDED), PADDED)  # it is as large
    reads, plain = ([x], []) if plane is None else ([], [plane[0]])
    return Operation("images_border", reads, made, slots, [], plain=plain, image=image)
