"""headrace.DynamicLinear: rows that are quantised as they come, times int8 weights, plus a bias.

Its inputs are x (float32 rows), int8 weights [read, written], their scales and zero points, and
maybe a bias; what it computes is DynamicQuantizeLinear, MatMulInteger, Cast, Mul and Add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.kernels import convolution_u8, sparse_product_u8, weights_u8
from headrace.kernels.dynamic_columns import SCRATCH
from headrace.kernels.dynamic_u8 import MOST_THREADS, PART
from headrace.kernels.geometry import Geometry
from headrace.kernels.requantise import pixel_bytes
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import PADDED, Addresses, Cut, Image, Operation, Weight, image_of
from headrace.networks.operators.sparse_dynamic import codes_bytes, codes_of, sparse_dynamic
from headrace.networks.quantisation import int8_weights, named


def _linear(graph: Graph, node: Node) -> Operation | None:
    x, name, scales, zeros = node.inputs[:4]
    bias_name, y = named(node.inputs, 4), node.outputs[0]
    read, written = image_of(graph, x), image_of(graph, y)
    rank = len(graph.shape(x) or ())
    shape = graph.constants.type(name).shape if name in graph.constants else None
    if read is None or written is None or x in graph.constants or rank not in (2, 3):
        return None
    if shape is None or shape != (read.channels, written.channels):
        return None
    key = tuple(graph.constants.identity(n) for n in (name, scales, zeros) if n)
    if scales not in graph.constants or (zeros and zeros not in graph.constants):
        return None
    found = int8_weights(graph, name, scales, zeros, 1)
    if found is None:
        return None
    w, factors = found
    bias = np.zeros(written.padded, np.float32)
    if bias_name:
        if bias_name not in graph.constants:
            return None
        given = graph.constants.array(bias_name).reshape(-1)
        if given.dtype != np.float32 or given.size not in (1, written.channels):
            return None
        bias[: written.channels] = given
    sums, padded_factors = np.zeros(written.padded, np.int32), np.zeros(written.padded, np.float32)
    sums[: written.channels] = w.sum(0, dtype=np.int32)
    padded_factors[: written.channels] = factors
    if pixel_bytes(read.channels) != read.padded:
        return None  # rows of up to 4 channels
    known = None if None in key else key
    ends = {"factors": padded_factors, "sums": sums, "bias": bias}

    def again() -> np.ndarray:  # so that nobody holds it between planning and packing
        found = int8_weights(graph, name, scales, zeros, 1)
        assert found is not None
        return found[0]

    product = sparse_dynamic(node, (read, written), w, again, known, graph)
    if product is None:
        product = _dense(node, (read, written), again, known)
    return _with_codes(node, read, written, product, ends)


def _with_codes(
    node: Node, read: Image, written: Image, product: Operation, ends: dict[str, Any]
) -> Operation:
    """What finds the range, makes codes of it and multiplies them."""
    x, rows, tiles = node.inputs[0], read.images, written.padded // PADDED
    ranges, turned = f"{node.outputs[0]}/headrace/range", product.kernel == sparse_product_u8.NAME
    codes = product.reads[0]
    tails_at = codes_bytes(read, turned)

    def range_slots(one: Operation, at: Addresses) -> list[Any]:
        return [at[x], rows, read.channels, read.padded, at[ranges]]

    def codes_slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at[x], at[codes], rows, read.padded, read.padded, at[ranges], tiles, at.own["factors"],
            at.own["sums"], at.own["bias"], at[codes] + tails_at,
            *([at.own["scratch"]] if turned else ()),
        ]  # fmt: skip

    quantise = Operation(
        "dynamic_columns" if turned else "dynamic_rows", [x, ranges], codes, codes_slots, [], ends,
        image=_memory(tails_at + tiles * weights_u8.TAIL), scratch=SCRATCH if turned else 0,
    )  # fmt: skip
    return Operation(
        "dynamic_range", [x], ranges, range_slots, [], image=_memory(MOST_THREADS * PART),
        also=[quantise, product],
    )  # fmt: skip


def _dense(
    node: Node, images: tuple[Image, Image], w: Callable[[], np.ndarray], key: Any
) -> Operation:
    (read, written), y = images, node.outputs[0]
    size = read.channels * written.channels
    rows, tiles = read.images, written.padded // PADDED
    codes, row_bytes = codes_of(node), read.padded
    quads = -(-read.channels // weights_u8.QUAD)
    n_bytes = quads * weights_u8.QUAD * written.padded
    geometry = Geometry(1, (1, rows), (1, rows), (1, 1)).slots(row_bytes, written.pixel_bytes)
    share_tiles = int(size > 4 * rows * read.padded)

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at.own["weights"], at[codes], at[y], at[codes] + codes_bytes(read, False), at[codes],
            quads, tiles, 255, *geometry, 0, 0, 1, share_tiles,
        ]  # fmt: skip

    def tiled() -> np.ndarray:
        return weights_u8.tiled_weights(w()[None, None], True)

    unique = None if key is None else ("dynamic", *key)
    return Operation(
        "convolution_u8", [codes], y, slots, [node],
        {"weights": Weight(n_bytes, tiled, unique, planned_by=True)}, macs=rows * size,
        cut=Cut(tiles, convolution_u8.some_tiles),
    )  # fmt: skip


def _memory(n_bytes: int) -> Image:
    """Of so many bytes at least."""
    return Image(1, 1, -(-n_bytes // (4 * PADDED)), PADDED)


OPERATORS = {"headrace.DynamicLinear": _linear}
