"""Attention as patterns find it (`headrace.networks.patterns.attention`).

headrace.Attention takes q, k and v of [batch, tokens, heads x channels], and a mask that is added
to the scores or none; its attributes are `heads`, `scale` and `zeros` (what a query gets whose keys
are all masked by -inf: zeros, or else no numbers), where in the rows of its inputs `columns` begin,
and `mask_rows`: whether the mask is rows of ours, [batch, keys], and not as it lies in ONNX.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from headrace.kernels.attention_rows import scratch_bytes
from headrace.networks.graph import Graph, Node
from headrace.networks.operation import Addresses, Operation, Weight, image_of
from headrace.networks.quantisation import named

MOST_QUERIES = 16  # at once, of any target


def _attention(graph: Graph, node: Node) -> Operation | None:
    q, k, v = node.inputs[:3]
    mask = named(node.inputs, 3)
    images = [image_of(graph, name) for name in (q, k, v)]
    shapes = [graph.shape(name) or () for name in (q, k, v, node.outputs[0])]
    made = image_of(graph, node.outputs[0])
    if None in images or made is None or any(len(shape) != 3 for shape in shapes):
        return None
    heads, scale = node.attribute("heads"), float(node.attribute("scale"))
    columns = node.attribute("columns", [0, 0, 0])
    batch, queries, width = shapes[3]
    keys = shapes[1][1]
    if width % heads:
        return None
    steps = (0, 0, 0)
    own: dict[str, np.ndarray | Weight] = {}
    in_rows = image_of(graph, mask) if node.attribute("mask_rows", 0) else None
    if in_rows is not None:
        steps = (in_rows.pixel_bytes if batch > 1 else 0, 0, 0)
    elif mask:
        of = graph.type(mask)
        found = None
        if of is not None and of.elem_type == onnx.TensorProto.FLOAT and of.shape is not None:
            found = mask_steps(of.shape, (batch, heads, queries, keys))
        if of is None or found is None:
            return None
        steps = found
        if mask in graph.constants:
            key = graph.constants.identity(mask)
            own["mask"] = Weight(
                4 * math.prod(of.shape or ()),
                lambda: np.ascontiguousarray(graph.constants.array(mask)),
                None if key is None else ("mask", key),
            )
    is_own = bool(own)
    n_bytes = scratch_bytes(keys, width // heads, MOST_QUERIES)
    rows = [one.pixel_bytes for one in images if one is not None]
    zeros = int(node.attribute("zeros", 0))

    def slots(one: Operation, at: Addresses) -> list[Any]:
        begins = [at[name] + 4 * c for name, c in zip((q, k, v), columns, strict=True)]
        added = at.own["mask"] if is_own else at[mask] if mask else 0
        return [
            *begins, at[one.makes], added, batch, heads, width // heads, queries,
            keys, *rows, made.pixel_bytes, scale, *steps, at.own["scratch"], one.scratch, zeros,
        ]  # fmt: skip

    read = dict.fromkeys((q, k, v) if in_rows is None else (q, k, v, mask))
    return Operation(
        "attention_rows_f32", list(read), node.outputs[0], slots, [node], own,
        macs=2 * batch * queries * keys * width, scratch=n_bytes,
        plain=[mask] if mask and not is_own and in_rows is None else [],
    )  # fmt: skip


def mask_steps(
    shape: tuple[int, ...], scores: tuple[int, int, int, int]
) -> tuple[int, int, int] | None:
    """Bytes between a mask's images, heads and queries; None: it does not spread over the scores.

    Args:
        shape: of the mask, float32.
        scores: images, heads, queries and keys.
    """
    padded = (1,) * (4 - len(shape)) + shape
    if len(shape) > 4 or padded[3] != scores[3]:
        return None
    steps, step = [], 4 * padded[3]
    for size, whole in zip(padded[2::-1], scores[2::-1], strict=True):
        if size not in (1, whole):
            return None
        steps.append(step if size > 1 else 0)
        step *= size
    return steps[2], steps[1], steps[0]


OPERATORS = {"headrace.Attention": _attention}
