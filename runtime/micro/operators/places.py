"""What ONNX's operators do without computing: other codes, other shapes, other places."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx

from headrace.micro.held import ROWS_TURNED, TO_FIRST, TO_LAST, image_of, pads_of
from headrace.micro.network import (
    Activation,
    Concatenation,
    Conversion,
    Value,
)
from headrace.networks.graph import Node
from headrace.networks.quantisation import named

if TYPE_CHECKING:
    from headrace.micro.reading import Reading


def concat(of: Reading, node: Node) -> None:
    """Values one behind the other, along rows, columns or channels."""
    made, shape = of.made_shape(node), of.graph.shape(node.outputs[0]) or ()
    rank = len(shape)
    axis = node.attribute("axis", 1) % rank
    if axis == 0:
        raise of.unsupported(node, "it joins batches; a batch of one is done")
    indices = range(len(node.inputs))
    first = rank > 2 and any(of.held(name).first for name in node.inputs)
    if first:
        reads = tuple(of.image(node, i, moved=True) for i in indices)
        place = 2 if axis == 1 else axis - rank + 2
    elif rank > 2:  # they lie as the graph has them
        reads, place = tuple(of.held(name).value for name in node.inputs), axis - rank + 3
        made = (1,) * (rank == 3) + shape[1:]
    else:
        reads, place = tuple(of.row(node, i) for i in indices), 0
    codes = reads[0].codes if all(value.codes == reads[0].codes for value in reads) else None
    makes = Value(node.outputs[0], made, codes)
    joined = [of.held(name) for name in node.inputs]
    real = all(held.real for held in joined)
    if codes is None and any(held.value.codes and not held.real for held in joined):
        raise of.unsupported(node, "it joins codes that mean different numbers")
    of.add(node, Concatenation(node.label, reads, makes, place), first=first, real=real)


def pad(of: Reading, node: Node) -> None:
    """Zeros that a convolution takes for its own, or a layer where something else reads them."""
    constants = of.graph.constants
    names = [named(node.inputs, i) for i in (1, 2, 3)]
    pads = node.attribute("pads") or (
        constants.array(names[0]).reshape(-1).tolist() if names[0] in constants else None
    )
    of.image(node, moved=True)  # what is left of other pads, and of other orders, is in layers now
    held = of.held(node.inputs[0])
    value = of.array(node, 2).reshape(-1) if names[1] else np.array([node.attribute("value", 0.0)])
    zero: float = 0.0
    if held.value.codes is not None and not held.real:
        zero = held.value.codes.zero + of.less(node.inputs[0])
    mode = (node.attribute("mode", b"constant") or b"").decode()
    rank = len(of.graph.shape(node.inputs[0]) or ())
    of.made_shape(node)
    if pads is None or names[2] or len(pads) != 2 * rank or mode != "constant" or value[0] != zero:
        raise of.unsupported(node, "zeros around rows and columns, of known numbers, are done")
    if rank not in (3, 4) or min(pads) < 0 or any(pads[i] for i in (0, 1, rank, rank + 1)):
        raise of.unsupported(node, f"pads {list(pads)}; those of rows and columns are done")
    of.put(node.outputs[0], held.padded(pads_of(pads[2:rank], pads[rank + 2 :])))


def quantize(of: Reading, node: Node) -> None:
    """Codes of a number, which the layer in front makes if nobody else reads it."""
    held, codes = of.given(node.inputs[0]), of.codes_of(node)
    if held.value.codes == codes:
        of.put(node.outputs[0], held.of_codes())
        return
    held = of.held(node.inputs[0])
    if held.value.codes is None:
        before = of.made_alone(node.inputs[0])
        if before is not None:
            of.change(node, before, codes)
            return
        makes = Value(node.outputs[0], held.value.shape, codes)
        of.add(node, Conversion(node.label, (held.value,), makes))
        of.put(node.outputs[0], replace(held, value=makes))
        return
    makes = Value(node.outputs[0], held.value.shape, codes)
    of.add(node, Activation(node.label, (held.value,), makes, "identity"))
    of.put(node.outputs[0], held.of_codes(makes))


def dequantize(of: Reading, node: Node) -> None:
    """Numbers of codes, which stay codes here."""
    if node.inputs[0] in of.graph.constants:
        return
    held, codes = of.given(node.inputs[0]), of.codes_of(node)
    if held.value.codes != codes:
        raise of.unsupported(node, "its codes mean something else where they were made")
    of.put(node.outputs[0], held.of_numbers())


def reshape(of: Reading, node: Node) -> None:
    """A view, or an image as a row, channels first."""
    held = of.held(node.inputs[0])
    shape = of.graph.shape(node.outputs[0]) or ()
    if shape[:1] != (1,) or len(shape) not in (2, 3, 4):
        raise of.unsupported(node, f"a result of shape {list(shape)}")
    if held.first and len(shape) > 2 and image_of(shape) == held.value.shape:
        of.put(node.outputs[0], held)  # an image of one row as a row, or the other way
        return
    if not held.in_order:
        if len(shape) != 2:
            raise of.unsupported(node, "it would take a transposition, which is not done")
        of.put(node.outputs[0], held.as_row())
        return
    # The name of what it makes first, so that a view that is made has it.
    of.put(node.outputs[0], held)
    of.view(node.outputs[0], held, (1,) * (len(shape) == 3) + shape[1:], first=False)


def transpose(of: Reading, node: Node) -> None:
    """Channels first or last: images lie as they did."""
    if node.inputs[0] in of.graph.constants:
        return
    held, perm = of.given(node.inputs[0]), tuple(node.attribute("perm", ()))
    turns = {TO_FIRST: True, TO_LAST: False, ROWS_TURNED: not held.first}
    if perm not in turns or held.first == turns[perm]:
        raise of.unsupported(node, f"a transposition {list(perm)}")
    of.put(node.outputs[0], held.turned(turns[perm]))


def identity(of: Reading, node: Node) -> None:
    """Nothing."""
    if node.inputs[0] not in of.graph.constants:
        of.put(node.outputs[0], of.given(node.inputs[0]))


def dropout(of: Reading, node: Node) -> None:
    """The same, as a network that is run has it."""
    mode, constants = named(node.inputs, 2), of.graph.constants
    if mode and (mode not in constants or constants.array(mode).any()):
        raise of.unsupported(node, "its training_mode is not false; export it for inference")
    identity(of, node)


def cast(of: Reading, node: Node) -> None:
    """Bytes as numbers: codes of a scale of 1."""
    held = of.given(node.inputs[0])
    if node.attribute("to") != onnx.TensorProto.FLOAT:
        raise of.unsupported(node, "bytes, or numbers, as FLOAT are done")
    codes = held.value.codes
    if codes is not None and not held.real and codes != of.codes_of(node):
        raise of.unsupported(node, "codes of a scale become numbers by DequantizeLinear")
    of.put(node.outputs[0], held if codes is None else held.of_numbers())
