"""Operations on images that the second cache does not hold, run band by band.

Where each operation reads nothing but what the one before makes, and that is large, some rows of
the last result are made by all of them before the next rows are: what lies between is then never
there as a whole, and stays in the cache. In an inverted residual that is what the first product
widens. Rows that bands have in common are computed again, so that no band waits for another's.
Sums are formed as they are of whole images (see `headrace.networks.passes.patches`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from headrace.networks.graph import Graph
from headrace.networks.operation import Addresses, Image, Operation, Slots, image_of
from headrace.networks.passes.patches import Range, pixels_behind, rows_of

FAR = 1 << 20  # bytes of an image that the second cache does not hold, beside others
NEAR = 512 << 10  # of what lies between two operations of a band, about
WEIGHTS = 256 << 10  # of an operation at most: each band reads them again


def in_bands(
    graph: Graph, operations: Sequence[Operation], wanted: Collection[str]
) -> list[Operation]:
    """The operations of a region, some of them cut into bands.

    Args:
        wanted: values that are wanted outside.
    """
    users = Counter(name for one in operations for name in one.inputs)
    makers = Counter(one.makes for one in operations)
    found: list[Operation] = []
    chain: list[Operation] = []
    for one in operations:
        if _can(graph, one, makers):
            before = chain[-1].makes if chain else None
            image = None if before is None else image_of(graph, before)
            if (
                before is not None
                and image is not None
                and (one.reads == [before] and users[before] == 1 and before not in wanted)
                and image.n_bytes > FAR
            ):
                chain.append(one)
                continue
            found += _banded(graph, chain)
            chain = [one]
        else:
            found += _banded(graph, chain)
            chain = []
            found.append(one)
    return found + _banded(graph, chain)


def _can(graph: Graph, one: Operation, makers: Mapping[str, int]) -> bool:
    """Whether it makes rows of one image out of rows of another."""
    if one.windows is None or one.plain or one.bounds or len(one.reads) != 1:
        return False
    if one.adds in one.reads or makers[one.makes] != 1:
        return False
    of = one.windows.geometry
    if of.images != 1 or (one.geometry is not None and (of.taps != (1, 1) or of.pads != (0, 0))):
        return False
    sizes = [(one.reads[0], of.read), (one.makes, of.written)]
    sizes += [] if one.adds is None else [(one.adds, of.written)]
    for name, size in sizes:
        image = image_of(graph, name)
        if image is None or (image.height, image.width) != size:
            return False
    weights = one.weights.values()
    return all((w.nbytes if isinstance(w, np.ndarray) else w.n_bytes) <= WEIGHTS for w in weights)


def _banded(graph: Graph, chain: Sequence[Operation]) -> list[Operation]:
    if len(chain) < 2:
        return list(chain)
    images: dict[str, Image] = {}
    for one in chain:
        for name in (*one.inputs, one.makes):
            image = image_of(graph, name)
            assert image is not None
            images[name] = image
    height = images[chain[-1].makes].height
    rows = height
    while rows > 1 and _between(chain, images, (0, rows)) > NEAR:
        rows -= 1
    bands = -(-height // rows)
    if bands == 1:
        return list(chain)
    ends = [height * i // bands for i in range(bands + 1)]
    return [one for made in pairwise(ends) for one in _band(chain, images, made)]


def _between(chain: Sequence[Operation], images: Mapping[str, Image], made: Range) -> int:
    """The most bytes that one operation hands to the next for some rows in the middle."""
    most = 0
    for one in reversed(chain[1:]):
        assert one.windows is not None
        of = one.windows.geometry
        n = (made[1] - made[0] - 1) * of.strides[0] + (of.taps[0] - 1) * of.dilations[0] + 1
        image = images[one.reads[0]]
        made = 0, min(n, image.height)
        most = max(most, made[1] * image.width * image.pixel_bytes)
    return most


def _band(
    chain: Sequence[Operation], images: Mapping[str, Image], made: Range
) -> list[Operation]:  # fmt: skip
    """The operations for some rows of the last result."""
    name = f"rows from {made[0]}"
    found: list[Operation] = []
    for i, one in reversed(list(enumerate(chain))):
        assert one.windows is not None
        whole = one.windows.geometry
        read, pads = pixels_behind(whole, 0, made)
        rows = rows_of(whole, made, read, pads)
        begins = {}
        if i == 0:
            begins[one.reads[0]] = read[0]
        if i + 1 == len(chain):
            begins[one.makes] = made[0]
        if one.adds is not None:
            begins[one.adds] = made[0]
        band = replace(
            one,
            slots=_at_rows(one.windows.slots(rows), begins, images),
            macs=one.macs // whole.written[0] * rows.written[0],
        )
        if i > 0:
            band.reads = [f"{one.reads[0]}/headrace/{name}"]
        if i + 1 < len(chain):
            band.makes = f"{one.makes}/headrace/{name}"
            band.image = replace(images[one.makes], height=made[1] - made[0])
        if one.geometry is not None:
            band.geometry = rows.flat(), one.geometry[1]
        found.append(band)
        made = read
    return found[::-1]


def _at_rows(slots: Slots, begins: Mapping[str, int], images: Mapping[str, Image]) -> Slots:
    """The argument block where some values begin at such rows."""

    def moved(one: Operation, at: Addresses) -> list[Any]:
        there = {
            name: at[name] + row * images[name].width * one.step(name, images[name])
            for name, row in begins.items()
        }
        return slots(one, replace(at, values={**at.values, **there}))

    return moved
