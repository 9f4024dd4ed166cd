"""Which operations of a region run patch by patch, and on how many patches.

Source: MCUNetV2 (`passes.patches`), whose scheduler looks for the least peak memory. The least
arena often costs far more multiply-adds than one that is a little larger: of all that compute at
most a quarter of a region again and are nearly as small as the least of these, the one that
computes least again is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from headrace.networks.graph import Graph
from headrace.networks.layout import Layout
from headrace.networks.operation import Image, Operation, bytes_of, image_of
from headrace.networks.passes.patches import Axis, Stage, stages
from headrace.networks.quantisation import elem_type

GRIDS = range(2, 9)  # rows and columns of patches that are tried
AGAIN = 0.25  # of a region's multiply-adds, that "auto" computes again at most
SLACK = 1.1  # how much larger than the least arena one may be
_ROUGH = 1.25  # the same of estimates, before places are looked for

Choice = int | Literal["auto", "off"]


@dataclass(frozen=True)
class Patches:
    """What runs patch by patch.

    Attributes:
        grid: rows and columns of patches.
        first, last: labels of the first and last node.
        whole_arena_bytes: what the region would take layer by layer.
        whole_macs: multiply-adds of the region, layer by layer.
        macs: as it runs.
    """

    grid: int
    first: str
    last: str
    whole_arena_bytes: int
    whole_macs: int
    macs: int

    @property
    def overhead(self) -> float:
        """Multiply-adds that are computed again, as a share of those of the region.

        Below 0 where patches leave out what no operation reads.
        """
        return self.macs / self.whole_macs - 1 if self.whole_macs else 0.0


def checked(patches: object) -> Choice:
    """What a caller asks for.

    Raises:
        TypeError, ValueError: it is neither "auto", "off" nor a whole number of at least 2.
    """
    if isinstance(patches, str):
        if patches in ("auto", "off"):
            return "auto" if patches == "auto" else "off"
        if patches.isascii() and patches.isdigit():
            patches = int(patches)
    wanted = 'patches must be "auto", "off" or the rows and columns of patches, at least 2'
    if isinstance(patches, bool) or not isinstance(patches, int | str):
        raise TypeError(f"{wanted}, not {patches!r}")
    if isinstance(patches, str) or patches < 2:
        raise ValueError(f"{wanted}, not {patches!r}")
    return patches


def with_patches(
    graph: Graph, operations: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str],
    threads: int, choice: Choice,
) -> tuple[list[Operation], Patches | None]:  # fmt: skip
    """The operations of a region, of which the first run patch by patch where that takes less.

    Args:
        operations: whole.
        choice: "auto" looks for the grid as well, of those that compute little again; of a
            number, that one is taken even if it does not take less.
    """
    if choice == "off":
        return list(operations), None
    whole = Layout(graph, operations, inputs, outputs, threads).arena_bytes
    tried = _candidates(graph, operations, inputs, outputs, choice)
    if not tried:
        return list(operations), None
    sizes = {}
    for one in tried:
        few = [*one.largest(), *operations[one.stage.count :]]
        sizes[id(one)] = Layout(graph, few, inputs, outputs, threads).arena_bytes
    most = SLACK * min(sizes.values())
    good = [one for one in tried if sizes[id(one)] <= most]
    best = min(good, key=lambda one: (one.again, sizes[id(one)]))
    if choice == "auto" and sizes[id(best)] >= whole:
        return list(operations), None
    rest = list(operations[best.stage.count :])
    total = sum(one.macs for one in operations)
    nodes = [node for one in best.stage.operations for node in one.nodes]
    found = Patches(best.grid, nodes[0].label, nodes[-1].label, whole, total, total + best.again)
    return best.operations() + rest, found


class _Candidate:
    """A stage and a grid.

    Attributes:
        rough: about the bytes that it takes.
    """

    def __init__(self, stage: Stage, grid: int, rest: int) -> None:
        self.stage, self.grid = stage, grid
        self.rough = max(rest, stage.live_bytes(*(stage.widest(grid, axis) for axis in (0, 1))))

    @property
    def fits(self) -> bool:
        """Whether every result of each tile needs pixels: none has pads alone."""
        return all(one.read[0] < one.read[1] for tiles in self._axes for t in tiles for one in t.of)

    @cached_property
    def again(self) -> int:
        """Multiply-adds that are computed once more."""
        return self.stage.macs(*self._axes) - sum(one.macs for one in self.stage.operations)

    @cached_property
    def _axes(self) -> tuple[list[Axis], list[Axis]]:
        rows, columns = (
            [self.stage.tile(self.grid, i, axis) for i in range(self.grid)] for axis in (0, 1)
        )
        return rows, columns

    def largest(self) -> list[Operation]:
        """Of the patch that takes most, twice: the whole result is there while the second runs."""
        # Which takes most at one moment is among those that take most in all.
        rows, columns = (sorted(tiles, key=lambda one: -one.pixels)[:2] for tiles in self._axes)
        most = max(product(rows, columns), key=lambda pair: self.stage.live_bytes(*pair))
        return [one for name in ("first", "second") for one in self.stage.patch(*most, name)]

    def operations(self) -> list[Operation]:
        """Of all patches."""
        return [
            one
            for i, rows in enumerate(self._axes[0])
            for k, columns in enumerate(self._axes[1])
            for one in self.stage.patch(rows, columns, f"patch {i} {k}")
        ]


def _candidates(
    graph: Graph, operations: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str],
    choice: Choice,
) -> list[_Candidate]:  # fmt: skip
    """Those that may take about the least."""
    names = [name for one in operations for name in (*one.inputs, one.makes)]
    images = {n: of for n in names if (of := image_of(graph, n) or bytes_of(graph, n)) is not None}
    planes = {
        name: elem_type(graph, name)
        for name in inputs
        if name in images and len(graph.shape(name) or ()) == 4
    }
    rest = _live_bytes(operations, images, outputs)
    grids = GRIDS if choice == "auto" else [choice]
    found = []
    for stage in stages(operations, images, planes, outputs):
        of = images[stage.makes]
        for grid in grids:
            assert isinstance(grid, int)
            if grid <= min(of.height, of.width):
                found.append(_Candidate(stage, grid, max(rest[stage.count :], default=0)))
    most = AGAIN * sum(one.macs for one in operations) if choice == "auto" else math.inf

    def good(one: _Candidate) -> bool:
        return one.fits and one.again <= most

    by_size = sorted(found, key=lambda one: one.rough)
    least = next((one.rough for one in by_size if good(one)), 0)
    return [one for one in found if one.rough <= _ROUGH * least and good(one)]


def _live_bytes(
    operations: Sequence[Operation], images: Mapping[str, Image], outputs: Sequence[str]
) -> list[int]:
    """About the bytes that are there while each operation runs."""
    last = {name: i for i, one in enumerate(operations) for name in one.inputs}
    last.update(dict.fromkeys(outputs, len(operations)))
    live: dict[str, int] = {}
    found = []
    for i, one in enumerate(operations):
        if one.makes in images:
            live[one.makes] = images[one.makes].n_bytes
        found.append(sum(live.values()))
        live = {name: n for name, n in live.items() if last.get(name, -1) > i}
    return found
