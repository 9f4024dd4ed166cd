"""The first operations of a region, run patch by patch.

What they make last is cut into tiles. For each tile in turn every operation computes just those
pixels that come to matter to it; what tiles have in common is computed again. So no value between
the input and the last one is ever there as a whole, and as patches come one after the other, their
values take the same places of the arena. An operation on a patch is the same kernel on smaller
images, with pads only where the image ends: sums are formed of the same terms in the same order.

Source: Lin et al., "MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning"
(2021). Operations are from `Operation.windows`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from headrace.kernels.geometry import Geometry
from headrace.networks.layout import gather
from headrace.networks.operation import Addresses, Image, Operation, Planes

Range = tuple[int, int]  # the first pixel, and the one behind the last


class _Reads(NamedTuple):
    """Of one operation along one axis: what it makes, what it reads for that, and pads before."""

    made: Range
    read: Range
    pads: int


@dataclass(frozen=True)
class Axis:
    """What a tile takes along one axis.

    Attributes:
        needed: of each value.
        of: of each operation.
    """

    needed: Mapping[str, Range]
    of: Sequence[_Reads]

    @property
    def pixels(self) -> int:
        """Of all values."""
        return sum(end - begin for begin, end in self.needed.values())


class Stage:
    """Operations that may run patch by patch, from the first of a region on.

    Args:
        operations: of the stage, the last of which makes the only value that others read.
        images: how whole values lie.
        inputs: values from outside, with their types of ONNX.

    Attributes:
        count: of operations.
        makes: the last one's result.
    """

    def __init__(
        self, operations: Sequence[Operation], images: Mapping[str, Image],
        inputs: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.operations, self._images, self._inputs = operations, images, inputs
        self.count = len(operations)
        self.makes = operations[-1].makes

    def tile(self, grid: int, index: int, axis: int) -> Axis:
        """What a tile of a grid takes along rows (0) or columns (1)."""
        needed: dict[str, Range] = {self.makes: self._bounds(grid, index, axis)}
        of: list[_Reads] = []
        for one in reversed(self.operations):
            assert one.windows is not None
            made = needed[one.makes]
            read, pads = pixels_behind(one.windows.geometry, axis, made)
            of.append(_Reads(made, read, pads))
            # What is added may be what is read, with its halo.
            wanted = [(name, read) for name in one.inputs if name != one.adds or name in one.reads]
            wanted += [] if one.adds is None else [(one.adds, made)]
            for name, more in wanted:
                known = needed.get(name, more)
                needed[name] = min(known[0], more[0]), max(known[1], more[1])
        return Axis(needed, of[::-1])

    def widest(self, grid: int, axis: int) -> Axis:
        """A tile that hardly takes less than others: a large one, far from where the image ends."""

        def size(index: int) -> tuple[int, int]:
            begin, end = self._bounds(grid, index, axis)
            return end - begin, -abs(2 * index + 1 - grid)

        return self.tile(grid, max(range(grid), key=size), axis)

    def _bounds(self, grid: int, index: int, axis: int) -> Range:
        of = self._images[self.makes]
        size = (of.height, of.width)[axis]
        return size * index // grid, size * (index + 1) // grid

    def macs(self, rows: Sequence[Axis], columns: Sequence[Axis]) -> int:
        """Multiply-adds of all tiles."""
        total = 0
        for i, one in enumerate(self.operations):
            height, width = (
                sum(tile.of[i].made[1] - tile.of[i].made[0] for tile in tiles)
                for tiles in (rows, columns)
            )
            total += _macs_per_pixel(one) * height * width
        return total

    def live_bytes(self, rows: Axis, columns: Axis) -> int:
        """About the bytes that are there while a tile is computed, with the whole result."""
        last = {name: i for i, one in enumerate(self.operations) for name in one.inputs}
        live: dict[str, int] = {}
        most = 0
        for i, one in enumerate(self.operations):
            for name in (*one.inputs, one.makes):
                if name not in self._inputs:
                    (top, bottom), (left, right) = rows.needed[name], columns.needed[name]
                    of = self._images[name]
                    live[name] = of.images * (bottom - top) * (right - left) * of.pixel_bytes
            most = max(most, sum(live.values()))
            live = {name: n for name, n in live.items() if last.get(name, -1) > i}
        return most + self._images[self.makes].n_bytes

    def patch(self, rows: Axis, columns: Axis, name: str) -> list[Operation]:
        """The operations of one tile; the last ones write it into the whole result."""
        found: list[Operation] = []

        def own(value: str) -> str:
            return f"{value}/headrace/{name}"

        def image(value: str) -> Image:
            (top, bottom), (left, right) = rows.needed[value], columns.needed[value]
            return replace(self._images[value], height=bottom - top, width=right - left)

        def cropped(value: str, down: Range, across: Range) -> str:
            """A value of the patch, where there is more of it than an operation takes."""
            if (down, across) == (rows.needed[value], columns.needed[value]):
                return own(value)
            crop = f"{own(value)}/{down} {across}"
            of = replace(image(value), height=down[1] - down[0], width=across[1] - across[0])
            at = down[0] - rows.needed[value][0], across[0] - columns.needed[value][0]
            if all(one.makes != crop for one in found):
                found.extend(_copies(own(value), crop, image(value), at, of, (0, 0), of))
            return crop

        for i, one in enumerate(self.operations):
            down, across = rows.of[i], columns.of[i]
            taken = [self._taken_in(x, rows, columns, own(x)) for x in one.inputs]
            x = one.reads[0]
            if x in self._inputs and one.kernel == "images_from_floats":
                found.append(self._quantised(one, rows, columns, own(one.makes)))
                continue
            found.extend(
                gathered
                for gathered in taken
                if gathered is not None and all(other.makes != gathered.makes for other in found)
            )
            assert one.windows is not None
            geometry = _part(one.windows.geometry, down, across)
            patched = replace(
                one,
                reads=[cropped(x, down.read, across.read) for x in one.reads],
                adds=None if one.adds is None else cropped(one.adds, down.made, across.made),
                makes=own(one.makes),
                image=image(one.makes),
                slots=one.windows.slots(geometry),
                macs=_macs_per_pixel(one) * geometry.written[0] * geometry.written[1],
            )
            if one.geometry is not None:
                patched.geometry = geometry.flat(), one.geometry[1]
            found.append(patched)
        at = rows.needed[self.makes][0], columns.needed[self.makes][0]
        tile, whole = image(self.makes), self._images[self.makes]
        return found + _copies(own(self.makes), self.makes, tile, (0, 0), whole, at, tile)

    def _taken_in(self, x: str, rows: Axis, columns: Axis, made: str) -> Operation | None:
        """What brings an input's pixels in; None: it is none."""
        if x not in self._inputs:
            return None
        return gather(x, made, self._planes(x, rows, columns), self._inputs[x])

    def _quantised(self, one: Operation, rows: Axis, columns: Axis, made: str) -> Operation:
        """An input's pixels become bytes as they come in."""
        assert one.at_border is not None
        x, (kernel, slots) = one.reads[0], one.at_border
        planes = self._planes(x, rows, columns)
        image = replace(planes.image, item=1)
        return replace(
            one, kernel=kernel, slots=slots(planes), reads=[], plain=[x], makes=made, image=image,
            at_border=None,
        )  # fmt: skip

    def _planes(self, x: str, rows: Axis, columns: Axis) -> Planes:
        return Planes(self._images[x], rows.needed[x], columns.needed[x])


def stages(
    operations: Sequence[Operation], images: Mapping[str, Image], inputs: Mapping[str, int],
    wanted: Collection[str],
) -> list[Stage]:  # fmt: skip
    """All that may run patch by patch: they end where a single value is left.

    Args:
        operations: of a region.
        images: how values lie, as far as they are images.
        inputs: values from outside that are planes, with their types of ONNX.
        wanted: values that are wanted outside.
    """
    found = []
    last = {name: i for i, one in enumerate(operations) for name in one.inputs}
    last.update(dict.fromkeys(wanted, len(operations)))
    live: set[str] = set()
    for i, one in enumerate(operations):
        known = all(name in inputs or name in live for name in one.inputs)
        if not known or not _can(one, images) or last.get(one.makes, -1) <= i:
            break
        live.update((*one.inputs, one.makes))
        live = {name for name in live if name in inputs or last.get(name, -1) > i}
        left = {name for name in live if last.get(name, -1) > i}
        if left == {one.makes}:
            found.append(Stage(operations[: i + 1], images, inputs))
    return found


def _can(one: Operation, images: Mapping[str, Image]) -> bool:
    """Whether it makes parts of images out of parts of images."""
    if one.windows is None or one.plain or one.bounds:
        return False
    of = one.windows.geometry
    sizes = [(name, of.read) for name in one.reads]
    sizes += [(name, of.written) for name in one.inputs[len(one.reads) :]]
    return all(
        name in images and (images[name].height, images[name].width) == size
        for name, size in (*sizes, (one.makes, of.written))
    )


def pixels_behind(geometry: Geometry, axis: int, made: Range) -> tuple[Range, int]:
    """Pixels that some results need, and how many in front of the first one are pads."""
    stride, size = geometry.strides[axis], geometry.read[axis]
    first = made[0] * stride - geometry.pads[axis]
    reach = (made[1] - 1 - made[0]) * stride
    taps = range(0, geometry.taps[axis] * geometry.dilations[axis], geometry.dilations[axis])
    if first >= 0 and first + reach + taps[-1] < size:
        return (first, first + reach + taps[-1] + 1), 0
    # Of each tap, the first and the last pixel that is there.
    begins = [at + max(0, -(at // stride)) * stride for at in (first + tap for tap in taps)]
    ends = [at + min(reach, (size - 1 - at) // stride * stride) for at in (first + t for t in taps)]
    there = [(a, b) for a, b in zip(begins, ends, strict=True) if a <= b]
    begin = min((a for a, _ in there), default=0)
    return (begin, max((b + 1 for _, b in there), default=0)), begin - first


def _part(geometry: Geometry, down: _Reads, across: _Reads) -> Geometry:
    rows = rows_of(geometry, down.made, down.read, down.pads)
    return replace(
        rows,
        read=(rows.read[0], across.read[1] - across.read[0]),
        written=(rows.written[0], across.made[1] - across.made[0]),
        pads=(rows.pads[0], across.pads),
    )


def rows_of(geometry: Geometry, made: Range, read: Range, pads: int) -> Geometry:
    """A geometry that makes some rows out of others, with so many pads above."""
    return replace(
        geometry,
        read=(read[1] - read[0], geometry.read[1]),
        written=(made[1] - made[0], geometry.written[1]),
        pads=(pads, geometry.pads[1]),
    )


def _macs_per_pixel(one: Operation) -> int:
    """Of one row and column, of all images."""
    assert one.windows is not None
    rows, columns = one.windows.geometry.written
    return one.macs // (rows * columns)


def _copies(
    x: str, made: str, read: Image, source: tuple[int, int], written: Image, to: tuple[int, int],
    part: Image,
) -> list[Operation]:  # fmt: skip
    """Copies of so many pixels, from a row and column of one value to those of another."""

    def copy(index: int) -> Operation:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            ends = []
            for name, of, (row, column) in ((x, read, source), (made, written, to)):
                pixel = index * of.pixels + row * of.width + column
                ends.append(at[name] + pixel * of.pixel_bytes)
            # A row is copied as if it were the channels of a pixel: words of four bytes.
            words = part.width * part.pixel_bytes // 4
            steps = [of.width * of.pixel_bytes for of in (read, written)]
            return [*ends, part.height, words, *steps]

        # Nothing lies in another's memory (`spreads`): the rows of both lie one behind the other.
        return Operation("images_copy", [x], made, slots, [], image=written, spreads=True)

    return [copy(index) for index in range(part.images)]
