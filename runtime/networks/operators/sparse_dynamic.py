"""Products of quantised rows with int8 weights that are mostly zero, where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headrace.kernels.dynamic_columns import PANEL, columns_bytes
from headrace.kernels.sparse_product import kept_blocks
from headrace.kernels.sparse_product_u8 import (
    NAME,
    ROWS,
    SCRATCH,
    fours_of,
    front_bytes,
    pack,
    packed_bytes,
)
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import PADDED, Image, Operation, Sparse, Weight
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

    def found() -> tuple[int, int]:
        return int(np.count_nonzero(w)), int(fours_of(kept_blocks(w.T, ROWS)).sum())

    weights, fours = found() if key is None else graph.constants.remembered(("fours", key), found)
    in_matrices = graph.cpu.byte_matrix
    if not int8_pays(fours, read.images, read.channels, written.channels, in_matrices):
        return None
    size = w.size
    codes, rows, tiles = codes_of(node), read.images, written.padded // PADDED
    at_counts, at_entries = front_bytes(written.channels)
    tails_at = codes_bytes(read, True)

    def slots(one: Operation, at: Mapping[str, int]) -> list[Any]:
        begin = at["weights"]
        return [
            begin + at_entries, at[codes], at[one.makes], at[codes] + tails_at, read.padded, tiles,
            rows, written.pixel_bytes, begin + at_counts, begin, at["scratch"],
            0 if one.adds is None else at[one.adds], one.least, one.most,
        ]  # fmt: skip

    weight = Weight(
        packed_bytes(written.channels, fours), lambda: pack(again().T),
        None if key is None else (NAME, *key), making=12 * size, planned_by=True,
    )  # fmt: skip
    return Operation(
        NAME, [codes], node.outputs[0], slots, [node], {"weights": weight}, macs=rows * weights,
        scratch=SCRATCH, sparse=Sparse(1 - weights / size, "4x1"),
    )  # fmt: skip
