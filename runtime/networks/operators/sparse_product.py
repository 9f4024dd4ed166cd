"""Products of pixels with weights that are mostly zero, where that is faster than dense ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from headrace.kernels.geometry import Geometry
from headrace.kernels.sparse_product import (
    counts_at,
    entry_bytes,
    front,
    front_bytes,
    kernel_of,
    pack,
    scratch_bytes,
    some_tiles,
)
from headrace.networks.graph import Constants, Node
from headrace.networks.operation import (
    PADDED,
    Addresses,
    Cut,
    Image,
    Operation,
    Slots,
    Sparse,
    Weight,
    Windows,
    pixelwise,
    tile_begins,
)
from headrace.networks.sparse_choice import (
    LEAST_PIXELS,
    Kept,
    full_of,
    kept_of,
    rows_that_pay,
)


def sparse_product(
    node: Node, geometry: Geometry, images: tuple[Image, Image], w: Callable[[], np.ndarray],
    key: Any, bias: np.ndarray, constants: Constants,
    runs: Callable[[], Iterator[tuple[int, int, np.ndarray]]] | None = None,
) -> Operation | None:  # fmt: skip
    """The operation of weights [..., channels read, channels written]; None: dense is faster.

    Args:
        geometry: of the convolution, flat.
        images: that are read and written.
        w: gives the weights.
        key: what tells them from others; None: nothing does.
        constants: of the network, which remembers what was found of weights.
        runs: gives the weights in parts; None: they can only be had whole.
    """
    read, written = images
    pixels = geometry.read[1]
    if geometry != Geometry(1, (1, pixels), (1, pixels), (1, 1)):
        return None
    if pixels < LEAST_PIXELS or read.channels < PADDED or written.channels < PADDED:
        return None

    def matrix() -> np.ndarray:  # [written, read]
        return w().reshape(read.channels, written.channels).T

    def found() -> Kept:
        full = None if runs is None else full_of(part for _, _, part in runs())
        return kept_of(matrix()) if full is None else full

    kept = found() if key is None else constants.remembered(("zeros", key), found)
    rows = rows_that_pay(kept, pixels, read.channels, written.channels)
    if rows is None:
        return None
    size, kernel = (read.channels, written.channels), kernel_of(rows)
    begins = tile_begins(kept.blocks[rows], entry_bytes(rows))
    making = 16 * math.prod(size)
    weight = Weight(
        begins[-1], lambda: pack(matrix(), rows), None if key is None else (kernel, key),
        making=making,
    )  # fmt: skip
    places = Weight(
        front_bytes(*size, rows), lambda: front(matrix(), rows),
        None if key is None else (kernel, "front", key), making=making,
    )  # fmt: skip
    at_counts = counts_at(*size)
    turns = rows < PADDED
    scratch = scratch_bytes(read.channels, written.channels) if turns else 0

    def part(geometry: Geometry) -> Slots:
        def slots(one: Operation, at: Addresses) -> list[Any]:
            return [
                at.own["weights"], at[one.reads[0]], at[one.makes], at.own["bias"],
                0 if one.adds is None else at[one.adds], read.channels, written.padded // PADDED,
                one.least, one.most, geometry.pixels, read.pixel_bytes, written.pixel_bytes,
                at.own["front"] + at_counts, at.own["front"], at.own["scratch"] if turns else 0,
                one.scratch,
            ]  # fmt: skip

        return slots

    windows = Windows(pixelwise(read), part)
    return Operation(
        kernel, [node.inputs[0]], node.outputs[0], part(windows.geometry), [node],
        {"weights": weight, "front": places, "bias": bias}, macs=kept.weights * pixels,
        scratch=scratch, cut=Cut(len(begins) - 1, partial(some_tiles, rows=rows), 1, begins),
        sparse=Sparse(1 - kept.weights / (read.channels * written.channels), f"{rows}x1"),
        windows=windows,
    )  # fmt: skip
