"""com.microsoft.MatMulNBits: rows times weights of 4 bits, which stay packed in memory.

An `accuracy_level` of 4 asks for activations of 8 bits; they get a scale for each 32 values. Else
they are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx

from headrace.kernels import n_bits_rows
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import PADDED, Addresses, Cut, Image, Operation, Weight, image_of
from headrace.networks.quantisation import named
from headrace.sparse.linear import Q8_BLOCK, activation_bytes
from headrace.sparse.n_bits import WEIGHTS, raw_blocks

INT8 = 4  # accuracy_level
ROWS = 512  # of weights that are unpacked at a time, while they are tiled


class _Weights(NamedTuple):
    """What a node says of its weights: names of constants, and sizes."""

    graph: Graph
    codes: str
    scales: str
    zeros: str
    inputs: int
    outputs: int
    group: int

    @property
    def key(self) -> Any:
        """What tells them from others; None: nothing does."""
        names = filter(None, (self.codes, self.scales, self.zeros))
        found = [self.graph.constants.identity(name) for name in names]
        return None if None in found else (*found, self.group)

    def tiled(self, how: Callable[[Any, Any, Any], np.ndarray], group: int) -> np.ndarray:
        """Weights as `how` makes them of codes, zeros and scales of groups of `group` inputs."""
        constants, n_groups = self.graph.constants, self.inputs // self.group
        packed = constants.array(self.codes).reshape(self.outputs, -1)
        scales = constants.array(self.scales).reshape(self.outputs, n_groups)
        zeros = np.full((self.outputs, n_groups), 8, np.uint8)
        if self.zeros:
            pairs = constants.array(self.zeros).reshape(self.outputs, -1)
            zeros = _nibbles(pairs)[:, :n_groups]
        again = self.group // group
        parts = [
            how(_nibbles(packed[at : at + ROWS]), np.repeat(zeros[at : at + ROWS], again, 1),
                np.repeat(scales[at : at + ROWS], again, 1))
            for at in range(0, self.outputs, ROWS)
        ]  # fmt: skip
        return np.concatenate(parts)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The low and the high half of each byte, one after the other."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def _n_bits(graph: Graph, node: Node) -> Operation | None:
    x, codes, scales = node.inputs[:3]
    zeros, order, bias_name = (named(node.inputs, i) for i in (3, 4, 5))
    inputs, outputs = node.attribute("K"), node.attribute("N")
    group = node.attribute("block_size")
    read, written = image_of(graph, x), image_of(graph, node.outputs[0])
    if read is None or written is None or x in graph.constants or order:
        return None
    if len(graph.shape(x) or ()) not in (2, 3) or read.channels != inputs:
        return None
    if node.attribute("bits", 4) != 4 or node.attribute("weight_prepacked", 0):
        return None
    if inputs % max(group, n_bits_rows.CHUNK):
        return None  # the last group is not whole
    n_groups = inputs // group
    sizes = {
        codes: (onnx.TensorProto.UINT8, outputs * inputs // 2),
        scales: (onnx.TensorProto.FLOAT, outputs * n_groups),
        zeros: (onnx.TensorProto.UINT8, outputs * -(-n_groups // 2)),
        bias_name: (onnx.TensorProto.FLOAT, outputs),
    }
    wanted = {codes, scales, *filter(None, (zeros, bias_name))}
    if len(wanted) != sum(1 for name in (codes, scales, zeros, bias_name) if name):
        return None  # the same for two
    if not all(_is(graph, name, *sizes[name]) for name in wanted):
        return None
    bias = np.zeros(written.padded, np.float32)
    if bias_name:
        bias[:outputs] = graph.constants.array(bias_name).reshape(-1)
    weights = _Weights(graph, codes, scales, zeros, inputs, outputs, group)
    images = read, written
    if node.attribute("accuracy_level", 0) == INT8 and group % Q8_BLOCK == 0:
        return _coded(node, images, weights, bias)
    return _floats(node, images, weights, bias)


def _is(graph: Graph, name: str, elem_type: int, elements: int) -> bool:
    if name not in graph.constants:
        return False
    of = graph.constants.type(name)
    return of.elem_type == elem_type and int(np.prod(of.shape or ())) == elements


def _floats(
    node: Node, images: tuple[Image, Image], weights: _Weights, bias: np.ndarray
) -> Operation:
    read, written = images
    group, tiles = weights.group, written.padded // PADDED

    def slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at.own["weights"], at[one.reads[0]], at[one.makes], at.own["bias"], read.images,
            read.channels, group, tiles, read.pixel_bytes, written.pixel_bytes, at.own["scratch"],
            one.scratch,
        ]  # fmt: skip

    def tiled() -> np.ndarray:
        return weights.tiled(n_bits_rows.tiled, group)

    key = weights.key
    n_bytes = tiles * n_bits_rows.tile_bytes(read.channels, group)
    weight = Weight(n_bytes, tiled, None if key is None else ("product_rows_n4", key))
    return Operation(
        "product_rows_n4", [node.inputs[0]], node.outputs[0], slots, [node],
        {"weights": weight, "bias": bias}, macs=read.images * read.channels * written.channels,
        scratch=n_bits_rows.scratch_bytes(), cut=Cut(tiles, n_bits_rows.some_tiles),
    )  # fmt: skip


def _coded(
    node: Node, images: tuple[Image, Image], weights: _Weights, bias: np.ndarray
) -> Operation:
    read, written = images
    x, y = node.inputs[0], node.outputs[0]
    of = WEIGHTS[max(group for group in WEIGHTS if weights.group % group == 0)]
    rows, tiles = read.images, written.padded // PADDED
    side = 1 if rows == 1 else weights.graph.cpu.tokens("q8")  # rows whose codes lie side by side
    padded_rows = -(-rows // side) * side
    codes = f"{y}/headrace/codes"
    # The product writes all rows of the last group.
    spare = f"{y}/headrace/rows" if padded_rows > rows else y
    n_bytes = activation_bytes("q8", read.channels)
    counts = np.array([rows, 0], np.int64)

    def code_slots(one: Operation, at: Addresses) -> list[Any]:
        begin = at[x]
        return [
            begin, begin, 0, 0, at[codes], read.channels, at.own["counts"], at.own["counts"] + 8,
            read.pixel_bytes, read.pixel_bytes, n_bytes * side, side, 0, 0, at.own["scratch"],
            one.scratch, 0.0, 0,
        ]  # fmt: skip

    def product_slots(one: Operation, at: Addresses) -> list[Any]:
        return [
            at.own["weights"], at[codes], at[spare], read.channels // of.block, tiles,
            at.own["counts"], 0, written.pixel_bytes, at.own["bias"], n_bytes * side,
        ]  # fmt: skip

    def copy_slots(one: Operation, at: Addresses) -> list[Any]:
        step = written.pixel_bytes
        return [at[spare], at[y], rows, written.padded, step, one.step(y, written)]

    def tiled() -> np.ndarray:
        return weights.tiled(lambda *parts: of.tile(raw_blocks(*parts)), of.block)

    key = weights.key
    weight = Weight(
        tiles * (read.channels // of.block) * of.tile_block_bytes, tiled,
        None if key is None else (of.name, key),
    )  # fmt: skip
    more = [
        Operation(
            f"{'gemv' if side == 1 else 'gemm'}_{of.name}", [codes], spare, product_slots, [],
            {"weights": weight, "bias": bias, "counts": counts},
            macs=rows * read.channels * written.channels, cut=Cut(tiles, _some_tiles),
            image=None if spare == y else Image(padded_rows, 1, 1, written.channels),
        )
    ]  # fmt: skip
    if spare != y:
        more.append(Operation("images_copy", [spare], y, copy_slots, []))
    return Operation(
        "copy_q8", [x], codes, code_slots, [node], {"counts": counts}, also=more,
        scratch=read.pixel_bytes, image=Image(1, 1, padded_rows, n_bytes // 4),
    )  # fmt: skip


def _some_tiles(slots: list[Any], first: int, tiles: int) -> list[Any]:
    """The argument block of a product by codes (`headrace.sparse.linear`) for some tiles."""
    found = [*slots]
    for slot in (2, 8):
        found[slot] += first * PADDED * 4
    found[4] = tiles
    return found


# Those of the file, and those that it is taken apart into.
OPERATORS = {"com.microsoft.MatMulNBits": _n_bits, "headrace.MatMulNBits": _n_bits}
# For the table in docs/onnx.md: which of them.
WHICH = {
    "MatMulNBits (com.microsoft)": (
        "2, 4 and 8 bits (2 as codes of 4, 8 as two products, of the high and the low half), "
        "groups of 16 to 256, weights packed in memory; no group index; rows of whole groups. "
        "Activations of 8 bits (a scale for each 32) only where `accuracy_level` is 4"
    ),
}
