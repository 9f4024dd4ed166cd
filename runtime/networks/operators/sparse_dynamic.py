"""Products of quantised rows with int8 weights that are mostly zero, where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.kernels.dynamic_columns import PANEL, columns_bytes
from headrace.kernels.sparse_product import kept_blocks
from headrace.kernels.sparse_product_u8 import (
    BLOCKS,
    ENTRY,
    NAME,
    ROWS,
    SCRATCH,
    fours_of,
    front,
    front_bytes,
    pack,
    some_tiles,
)
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import (
    PADDED,
    Addresses,
    Cut,
    Image,
    Operation,
    Sparse,
    Weight,
    tile_begins,
)
from headrace.networks.sparse_choice import int8_pays


def codes_of(node: Node) -> str:
    """The name of the codes of what a DynamicLinear multiplies."""
    return f"{node.outputs[0]}/headrace/codes"


def codes_bytes(read: Image, turned: bool) -> int:
    """Of these codes, behind which the product's tails lie."""
    return columns_bytes(read.images, read.padded) if turned else read.images * read.padded


def sparse_dynamic(
    node: Node, images: tuple[Image, Image], w: np.ndarray, again: Callable[[], np.ndarray],
    key: Any, graph: Graph,
) -> Operation | None:  # fmt: skip
    """The product of int8 weights [channels read, channels written]; None: dense is faster.

    Args:
        images: rows that are read and written.
        again: gives the weights once more.
        key: what tells the weights from others; None: nothing does.
        graph: of the node, whose constants remember what was found of weights.
    """
    read, written = images
    if read.padded < PANEL:
        return None

    def found() -> tuple[int, tuple[int, ...]]:
        of_blocks = fours_of(kept_blocks(w.T, ROWS)).reshape(-1, BLOCKS)
        return int(np.count_nonzero(w)), tuple(of_blocks.sum(axis=1).tolist())

    weights, fours = found() if key is None else graph.constants.remembered(("fours", key), found)
    in_matrices = graph.cpu.byte_matrix
    if not int8_pays(sum(fours), read.images, read.channels, written.channels, in_matrices):
        return None
    size = w.size
    codes, rows, tiles = codes_of(node), read.images, written.padded // PADDED
    at_counts, n_front = front_bytes(written.channels)
    begins = tile_begins(fours, ENTRY)
    tails_at = codes_bytes(read, True)

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at.own["weights"], at[codes], at[one.makes], at[codes] + tails_at, read.padded, tiles,
            rows, written.pixel_bytes, at.own["front"] + at_counts, at.own["front"],
            at.own["scratch"], 0 if one.adds is None else at[one.adds], one.least, one.most,
        ]  # fmt: skip

    weight = Weight(
        begins[-1], lambda: pack(again().T), None if key is None else (NAME, *key),
        making=12 * size, planned_by=True,
    )  # fmt: skip
    places = Weight(
        n_front, lambda: front(again().T), None if key is None else (NAME, "front", *key),
        making=12 * size,
    )  # fmt: skip
    return Operation(
        NAME, [codes], node.outputs[0], slots, [node], {"weights": weight, "front": places},
        macs=rows * weights, cut=Cut(tiles, some_tiles, 1, begins),
        scratch=SCRATCH, sparse=Sparse(1 - weights / size, "4x1"),
    )  # fmt: skip
