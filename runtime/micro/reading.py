"""A network for microcontrollers out of an ONNX or TFLite file.

Both come as graphs of ONNX operators (`headrace.networks.graph`): quantised values are codes, with
DequantizeLinear and QuantizeLinear around operators of numbers, and images have their channels
first. Here images lie pixel by pixel; what a file has in another order keeps a note of that until
somebody needs to know, which is at inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.onnx_model import OnnxModel, open_onnx
from headrace.loaders.reader import TensorReader
from headrace.loaders.tflite import SUFFIX, open_tflite
from headrace.micro.held import NO_PADS, TO_FIRST, Held, Pads, image_of
from headrace.micro.mixed import mixed
from headrace.micro.network import (
    UNSIGNED_ZERO,
    Codes,
    Layer,
    MicroNetwork,
    Padding,
    Port,
    Value,
    View,
)
from headrace.micro.operators import OPERATORS
from headrace.networks.graph import Graph, Node, TensorType, graph_of
from headrace.networks.operation import BYTES
from headrace.networks.operators import MALFORMED
from headrace.networks.patterns.activations import with_hard_swish
from headrace.networks.patterns.match import Matcher
from headrace.networks.ports import port_of
from headrace.networks.quantisation import elem_type, named
from headrace.networks.specialise import specialise

_TYPES = (onnx.TensorProto.FLOAT, *BYTES)
# What gives the same whether its input is quantised or its result.
_BEFORE_CODES = (
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Concat", "Pad",
)  # fmt: skip
_TO_CODES, _TO_NUMBERS = ("QuantizeLinear",), ("DequantizeLinear", "Cast")
_OF_CHANNELS_FIRST = ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization")
_LOOK_THROUGH = (*_TO_CODES, *_TO_NUMBERS)


def read_network(path: str | Path) -> MicroNetwork:
    """Read a file of a small network: its weights are in memory then.

    Args:
        path: an ONNX or TFLite file.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFileError: it is none of these, or damaged.
        UnsupportedError: it has an operator, a type or a shape that microcontrollers do not run.
    """
    path = Path(path)
    model = open_tflite(path) if path.suffix.lower() == SUFFIX else open_onnx(path)
    with closing(TensorReader()) as reader:
        return _network(Reading(path, model, graph_of(model, reader)))


def _types(model: OnnxModel, graph: Graph) -> dict[str, TensorType]:
    """Of inputs, with a batch of one."""
    found = {}
    for info in model.proto.graph.input:
        if info.name not in graph.inputs:
            continue
        port, elem_type = port_of(info), info.type.tensor_type.elem_type
        if port.shape is None or elem_type not in _TYPES:
            raise UnsupportedError(
                f"its input {info.name!r} is {port.text}; FLOAT, INT8 and UINT8 of known shapes "
                "are done",
                path=model.path,
            )
        shape = tuple(
            1 if i == 0 and not isinstance(d, int) else d for i, d in enumerate(port.shape)
        )
        if not all(isinstance(d, int) and d > 0 for d in shape) or shape[:1] != (1,):
            raise UnsupportedError(
                f"its input {info.name!r} is {port.text}; a batch of one, and else known sizes, "
                "are done",
                path=model.path,
            )
        found[info.name] = TensorType(elem_type, tuple(int(d) for d in shape if d is not None))
    return found


class Reading:
    """A network while it is read.

    Attributes:
        path: of the file.
        graph: what it says.
        layers: so far.
    """

    def __init__(self, path: Path, model: OnnxModel, graph: Graph) -> None:
        self.path = path
        self.graph = with_hard_swish(specialise(graph, _types(model, graph)))
        self.matcher = Matcher(self.graph)
        self.layers: list[Layer] = []
        self._held: dict[str, Held] = {}
        self._makers: dict[str, int] = {}  # layers by the name of what they make

    def unsupported(self, node: Node, message: str) -> UnsupportedError:
        """That a node is not done here."""
        return UnsupportedError(f"{node.label}: {message}", path=self.path)

    # Inputs and outputs

    def input(self, name: str) -> Port:
        """Take an input of the graph."""
        shape = self.graph.shape(name) or ()
        first = len(shape) == 4 and not self._is_turned(name)
        first = first or (len(shape) == 3 and self._has_channels_first(name))
        kept = image_of(shape) if first else ((1,) * (len(shape) == 3) + shape[1:])
        is_real = self.graph.types[name].elem_type == onnx.TensorProto.FLOAT
        node = self._quantiser(name, _TO_CODES if is_real else _TO_NUMBERS)
        if node is None and not is_real:
            raise UnsupportedError(
                f"its input {name!r} has codes of no known scale", path=self.path
            )
        codes = None if node is None else self.codes_of(node)
        value = Value(name, kept if len(kept) in (1, 3) else (math.prod(kept),), codes)
        held = self._held[name] = Held(value, first, real=is_real and codes is not None)
        return Port(name, shape, value, first and not held.in_order, is_real, self.less(name) > 0)

    def less(self, name: str) -> int:
        """What is taken from codes of the graph, so that they are signed."""
        return UNSIGNED_ZERO if elem_type(self.graph, name) == onnx.TensorProto.UINT8 else 0

    def _quantiser(self, name: str, ops: Sequence[str]) -> Node | None:
        """What says first how an input is quantised; all that reads it has to say the same."""
        found: list[Node | None] = []
        for user in self.matcher.users.get(name, []):
            if user.op in ops:
                found.append(user)
            elif user.op in _BEFORE_CODES:
                found.append(self._quantiser(user.outputs[0], ops))
            else:
                found.append(None)
        if name in self.graph.outputs or not found or found[0] is None:
            return None
        codes = self.codes_of(found[0])
        alike = all(one is not None and self.codes_of(one) == codes for one in found)
        return found[0] if alike else None

    def _is_turned(self, name: str) -> bool:
        """Whether all that reads an image has its channels put first."""
        users = self.matcher.users.get(name, [])
        return bool(users) and all(
            self._is_turned(user.outputs[0]) if user.op in _LOOK_THROUGH
            else user.op == "Transpose" and tuple(user.attribute("perm", ())) == TO_FIRST
            for user in users
        )  # fmt: skip

    def _has_channels_first(self, name: str) -> bool:
        """Whether what reads rows says so."""
        return any(
            self._has_channels_first(user.outputs[0]) if user.op in (*_LOOK_THROUGH, "Pad")
            else user.op in _OF_CHANNELS_FIRST
            for user in self.matcher.users.get(name, [])
        )  # fmt: skip

    def output(self, name: str) -> Port:
        """Give an output of the graph."""
        held, shape = self.held(name), self.graph.shape(name)
        if shape is None:
            raise UnsupportedError(f"the type of its output {name!r} is not known", path=self.path)
        turned = held.first and not held.in_order
        if held.flat:
            raise UnsupportedError(
                f"its output {name!r} is an image as a row, channels first; that is not done",
                path=self.path,
            )
        is_real = held.real or held.value.codes is None
        return Port(name, shape, held.value, turned, is_real, self.less(name) > 0)

    # Values

    def held(self, name: str) -> Held:
        """A value that is there, with the zeros around it.

        Raises:
            UnsupportedError: it is a constant.
        """
        held = self.given(name)
        if held.pads == NO_PADS:
            return held
        made = self.surrounded(held.value, f"{name}/padded", held.pads)
        self.put(name, replace(held, value=made, pads=NO_PADS))
        return self._held[name]

    def surrounded(self, image: Value, name: str, pads: Pads) -> Value:
        """An image with zeros around it."""
        (above, left), (below, right) = pads
        rows, columns, channels = image.image
        shape = above + rows + below, left + columns + right, channels
        made = Value(name, shape, image.codes)
        self.layers.append(Padding(name, (image,), made, *pads))
        return made

    def given(self, name: str) -> Held:
        """The same, or what is to have zeros around it.

        Raises:
            UnsupportedError: it is a constant.
        """
        if name not in self._held:
            raise UnsupportedError(
                f"{name!r} is a constant where a value is wanted, and that is not done",
                path=self.path,
            )
        return self._held[name]

    def put(self, name: str, held: Held) -> None:
        """What a name of the graph stands for from now on."""
        self._held[name] = held

    def number(self, node: Node, index: int = 0) -> Held:
        """An input that is a number in the graph."""
        return self._checked(node, self.held(node.inputs[index]))

    def row(self, node: Node, index: int) -> Value:
        """An input of numbers or codes that is one row in the graph, and lies so."""
        held = self.held(node.inputs[index])
        if not held.in_order:
            raise self.unsupported(node, "it reads an image as a row, channels first")
        return self.view(node.inputs[index], held, (held.value.elements,), first=False)

    def _checked(self, node: Node, held: Held) -> Held:
        if held.value.codes is not None and not held.real:
            raise self.unsupported(
                node, "it reads codes, where DequantizeLinear's results are done"
            )
        return held

    def unpadded(self, node: Node, most: tuple[int, int]) -> tuple[Value, Pads]:
        """The image that a node reads, and zeros around it, if each side has at most so many."""
        held = self.given(node.inputs[0])
        fits = all(n <= end for one in held.pads for n, end in zip(one, most, strict=True))
        if held.pads == NO_PADS or not held.first or not fits:
            return self.image(node), NO_PADS
        return self._checked(node, held).value, held.pads

    def is_constant(self, node: Node, index: int) -> bool:
        """Whether an input is one, of numbers or of codes."""
        name, constants = node.inputs[index], self.graph.constants
        source = self.matcher.maker(name, "DequantizeLinear")
        return name in constants or (source is not None and source.inputs[0] in constants)

    def image(self, node: Node, index: int = 0, *, moved: bool = False) -> Value:
        """An input that is an image, whose channels the graph has first.

        Args:
            moved: the node takes codes as they are, too.
        """
        held = self.held(node.inputs[index]) if moved else self.number(node, index)
        shape = self.graph.shape(node.inputs[index]) or ()
        if len(shape) not in (3, 4) or held.flat:
            raise self.unsupported(node, f"it reads {list(shape)}, and images are done")
        if held.first:
            return held.value
        if shape[1] != 1 and math.prod(shape[2:]) != 1:
            raise self.unsupported(node, "it would take a transposition, which is not done")
        return self.view(node.inputs[index], held, image_of(shape), first=True)

    def view(self, name: str, held: Held, shape: tuple[int, ...], *, first: bool) -> Value:
        """The elements of a value in another shape."""
        made = held.value
        if made.shape != shape:
            made = Value(f"{name}/{'x'.join(map(str, shape))}", shape, made.codes)
            self.layers.append(View(made.name, (held.value,), made))
        self._held[name] = replace(held, value=made, first=first, flat=False)
        return made

    def made_shape(self, node: Node) -> tuple[int, ...]:
        """Of a node's result, as values have it: an image with channels last, and no batch."""
        shape = self.graph.shape(node.outputs[0])
        if shape is None or shape[:1] != (1,) or len(shape) not in (2, 3, 4) or 0 in shape:
            raise self.unsupported(
                node, f"its result has the shape {shape}, and a batch of one image or row is done"
            )
        return shape[1:] if len(shape) == 2 else image_of(shape)

    def add(
        self, node: Node, layer: Layer, *, first: bool = True, flat: bool = False,
        real: bool = False,
    ) -> None:  # fmt: skip
        """A layer whose result is a node's.

        Args:
            first: the graph has an image's channels first.
            flat: the graph has it as one row.
            real: the graph has numbers, where the result may be codes.
        """
        names = {one.name for one in self.layers}
        if layer.name in names:  # files need not tell their nodes apart
            layer = replace(layer, name=f"{layer.name} ({len(self.layers)})")
        self._makers[layer.makes.name] = len(self.layers)
        self.layers.append(layer)
        first = first and len(self.graph.shape(node.outputs[0]) or ()) > 2
        real = real and layer.makes.codes is not None
        self.put(node.outputs[0], Held(layer.makes, first, real, flat))

    def made_alone(self, name: str) -> Layer | None:
        """The layer that makes a number, if nobody else reads it and it has no codes yet."""
        held = self._held.get(name)
        if held is None or held.value.codes is not None or held.flat or held.pads != NO_PADS:
            return None
        made, users = held.value.name, self.matcher.users
        if made not in self._makers or any(
            made == v.name for one in self.layers for v in one.reads
        ):
            return None
        # A value has several names where it only was moved: nobody may want any of them besides.
        names = [other for other, one in self._held.items() if one.value.name == made]
        if any(one in self.graph.outputs or len(users.get(one, [])) != 1 for one in names):
            return None
        return self.layers[self._makers[made]]

    def change(
        self, node: Node, layer: Layer, codes: Codes | None = None, index: int = 0, **changes: Any
    ) -> None:
        """Let a layer that makes a node's input take it in: it makes the node's result now."""
        at = self._makers.pop(layer.makes.name)
        makes = replace(layer.makes, name=node.outputs[0], codes=codes)
        self.layers[at] = replace(layer, makes=makes, **changes)
        self._makers[makes.name] = at
        self.put(node.outputs[0], replace(self.held(node.inputs[index]), value=makes))

    # Constants

    def array(self, node: Node, index: int) -> np.ndarray:
        """A constant of numbers that an input is."""
        name, constants = named(node.inputs, index), self.graph.constants
        source = self.matcher.maker(name, "DequantizeLinear")
        if source is not None and all(not one or one in constants for one in source.inputs):
            codes, scales = (constants.array(one) for one in source.inputs[:2])
            zero = named(source.inputs, 2)
            zeros = constants.array(zero) if zero else np.zeros_like(scales, np.int8)
            shape = [1] * codes.ndim
            if scales.size > 1:
                shape[source.attribute("axis", 1)] = -1
            whole = codes.astype(np.float64) - zeros.astype(np.float64).reshape(shape)
            found: np.ndarray = (whole * scales.reshape(shape)).astype(np.float32)
            return found
        if name not in constants:
            raise self.unsupported(node, f"{name!r} is no constant, and has to be one")
        return constants.array(name)

    def codes_of(self, node: Node) -> Codes:
        """Of QuantizeLinear or DequantizeLinear, or of bytes that become numbers."""
        constants = self.graph.constants
        if node.op == "Cast":
            return Codes(1.0, -self.less(node.inputs[0]))
        scale, zero = named(node.inputs, 1), named(node.inputs, 2)
        if scale in constants and (not zero or zero in constants):
            factor = constants.array(scale).reshape(-1)
            offset = constants.array(zero).reshape(-1) if zero else np.zeros(1, np.int8)
            of = (node.outputs if node.op in _TO_CODES else node.inputs)[0]
            fits = factor.size == offset.size == 1 and elem_type(self.graph, of) in BYTES
            if fits and 0 < factor[0] < np.inf:
                return Codes(float(factor[0]), int(offset[0]) - self.less(of))
        raise self.unsupported(node, "codes of 8 bits with one scale and one zero point are done")


def _network(reading: Reading) -> MicroNetwork:
    graph = reading.graph
    inputs = tuple(reading.input(name) for name in graph.inputs)
    for node in graph.nodes:
        if node.domain not in ("", "headrace") or node.op not in OPERATORS:
            known = ", ".join(sorted(OPERATORS))
            raise reading.unsupported(node, f"it does not run on microcontrollers; {known} do")
        try:
            OPERATORS[node.op](reading, node)
        except MALFORMED as error:
            message = f"{node.label}: its inputs or attributes are none of {node.op}'s: {error}"
            raise ModelFileError(message, path=reading.path) from error
    outputs = tuple(reading.output(name) for name in graph.outputs)
    layers: tuple[Layer, ...] = tuple(reading.layers)
    if any(value.codes for layer in layers for value in (*layer.reads, layer.makes)):
        layers, inputs, outputs = mixed(layers, inputs, outputs)
    try:
        return MicroNetwork(reading.path.stem, layers, inputs, outputs)
    except UnsupportedError as error:
        raise UnsupportedError(str(error), path=reading.path) from None
