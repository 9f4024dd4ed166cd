"""Where the values of a region lie, before there is memory for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headrace.networks.graph import Graph
from headrace.networks.lifetimes import ALIGNED, Life, placed
from headrace.networks.operation import (
    Addresses,
    Image,
    Operation,
    Planes,
    all_planes,
    bytes_of,
    image_of,
)
from headrace.networks.passes.at_borders import passing
from headrace.networks.passes.borders import with_borders
from headrace.networks.passes.in_place import in_place
from headrace.networks.passes.planes import write_planes
from headrace.networks.quantisation import added, elem_type

GIVEN = 1 << 62  # stands for addresses that are known only when it runs; 1 << 44 for each value
BEHIND = 64  # bytes that kernels may read behind a value
SCRATCH = "scratch of operations"  # the name of where it lies


class Layout:
    """Places of values in one arena, and the operations that know them.

    Args:
        graph: whose values they are.
        operations: of the region; they stay as they are.
        inputs, outputs: names of what comes from outside, and of what is wanted there.
        threads: each has its own scratch.

    Attributes:
        operations: as they are to run.
        images: how values lie.
        places: of those that lie in others.
        outside: places of inputs and outputs, from `GIVEN` on.
        given: those that are read or written there.
        arena_bytes: of all other values.
    """

    def __init__(
        self, graph: Graph, operations: Sequence[Operation], inputs: Sequence[str],
        outputs: Sequence[str], threads: int,
    ) -> None:  # fmt: skip
        self._inputs, self._outputs, self._threads = inputs, outputs, threads
        self._types = {name: elem_type(graph, name) for name in (*inputs, *outputs)}
        # What passes write into operations is theirs alone.
        own = [replace(one, reads=[*one.reads], steps={**one.steps}) for one in operations]
        at_border = passing(own, inputs, outputs)
        self.images = {
            name: _image(graph, name) for name in self._known(own) if name not in at_border
        }
        self.images |= {one.makes: one.image for one in own if one.image is not None}
        for name, one in at_border.items():
            assert one.at_border is not None
            planes = all_planes(_image(graph, name))
            one.kernel, one.slots = one.at_border[0], one.at_border[1](planes)
        own = self._without_gathers(with_borders(own, self.images, self._planes(graph, own)))
        for name in {n for one in own for n in one.plain}:
            self.images.pop(name, None)
        write_planes(own, self.images, outputs)
        self.images |= {one.makes: one.image for one in own if one.image is not None}
        self.operations, self.places = in_place(own, self.images, {*inputs, *outputs})
        # All have the same, so that each thread comes back to what is in its own caches.
        scratch = -(-max((one.scratch for one in self.operations), default=0) // ALIGNED) * ALIGNED
        for one in self.operations:
            one.scratch = scratch if one.scratch else 0
        ends = dict.fromkeys((*inputs, *outputs))
        self.outside = {name: GIVEN + (i << 44) for i, name in enumerate(ends)}
        # What lies as ONNX has it is read and written where the caller has it.
        self.given = {
            name: at
            for name, at in self.outside.items()
            if name not in self.images or self.images[name].as_in_onnx
        }
        self._offsets, self.arena_bytes = placed(self.lives())
        self.arena_bytes += BEHIND

    def _known(self, operations: Sequence[Operation]) -> list[str]:
        """All that lie as images, and that the graph knows."""
        read = {name for one in operations for name in one.inputs}
        inputs = [name for name in self._inputs if name in read]
        own = {one.makes for one in operations if one.image is not None}
        names = dict.fromkeys([*inputs, *(one.makes for one in operations)])
        return [name for name in names if name not in own]

    def _planes(
        self, graph: Graph, operations: Sequence[Operation]
    ) -> dict[str, tuple[str, Planes]]:
        """Values that are there as ONNX has them: what of which input they are."""
        found = {
            name: (name, all_planes(self.images[name]))
            for name in self._inputs
            if len(graph.shape(name) or ()) == 4 and name in self.images
        }
        return found | {
            one.makes: (one.plain[0], one.planes)
            for one in operations
            if one.planes is not None and one.kernel == "images_gather"
        }

    def _without_gathers(self, operations: Sequence[Operation]) -> list[Operation]:
        """Without those whose pixels are read where they come from."""
        read = {name for one in operations for name in one.inputs}
        return [one for one in operations if one.planes is None or one.makes in read]

    def lives(self) -> dict[str, Life]:
        """From when to when values are there, with the scratch that operations share."""
        last: dict[str, int] = {}
        first = dict.fromkeys((name for name in self._inputs if name in self.images), -1)
        for i, one in enumerate(self.operations):
            for name in one.inputs:
                last[self._root(name)] = i
            root = self._root(one.makes)
            first.setdefault(root, i)
            last[root] = i
        last.update({self._root(name): len(self.operations) for name in self._outputs})
        lives = {
            name: Life(self.images[name].n_bytes, begin, last.get(name, begin))
            for name, begin in first.items()
            if name not in self.given
        }
        using = [i for i, one in enumerate(self.operations) if one.scratch]
        if using:
            n_bytes = self.operations[using[0]].scratch * self._threads
            lives[SCRATCH] = Life(n_bytes, using[0], using[-1])
        return lives

    def _root(self, name: str) -> str:
        return self.places[name].root if name in self.places else name

    def addresses(self, base: int) -> dict[str, int]:
        """Of all values, in an arena that begins there."""
        found = {name: base + at for name, at in self._offsets.items()} | self.given
        found |= {name: found[at.root] + at.n_bytes for name, at in self.places.items()}
        return found | {_outside(name): at for name, at in self.outside.items()}

    def moves_in(self) -> list[Operation]:
        """What brings inputs into the arena."""
        return [
            gather(_outside(name), name, all_planes(self.images[name]), self._types[name])
            for name in self._inputs
            if name not in self.given
        ]

    def moves_out(self) -> list[Operation]:
        """What brings outputs out of it."""
        outputs = [name for name in self._outputs if name not in self.given]
        return [self._scatter(name) for name in outputs]

    def _scatter(self, name: str) -> Operation:
        of = self.images[name]
        ends = _ends(of, self._types[name])

        def slots(one: Operation, at: Addresses) -> list[Any]:
            sizes = [of.images, of.channels, of.pixels]
            return [at[name], at[_outside(name)], *sizes, *ends]

        kernel = "images_scatter" if of.item == 4 else "images_scatter_u8"
        return Operation(kernel, [name], _outside(name), slots, [])


def gather(x: str, makes: str, planes: Planes, kind: int) -> Operation:
    """Pixels of an input of this ONNX type, as an image."""
    of = planes.image
    ends = _ends(of, kind)

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x] + planes.begin, at[makes], *planes.slots(), *ends]

    kernel = "images_gather" if of.item == 4 else "images_gather_u8"
    return Operation(kernel, [], makes, slots, [], plain=[x], planes=planes, image=of)


def _ends(of: Image, kind: int) -> list[int]:
    return [of.padded] if of.item == 4 else [of.pixel_bytes, added(kind)]


def _outside(name: str) -> str:
    return f"{name}/headrace/outside"


def _image(graph: Graph, name: str) -> Image:
    found = image_of(graph, name) or bytes_of(graph, name)
    assert found is not None, name
    return found
