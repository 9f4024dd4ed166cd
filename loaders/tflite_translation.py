"""Values of a TFLite model as ONNX has them, in the versions that operators ask for.

TFLite's images lie pixel by pixel [images, rows, columns, channels], ONNX's channel by channel. So
an image has two versions here, of which one is made of the other only where somebody wants it: in
most networks that is at inputs and outputs. Quantised values are codes, with DequantizeLinear and
QuantizeLinear around operators of numbers, as ONNX files have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from headrace.errors import UnsupportedError
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.reader import TensorReader
from headrace.loaders.tflite_model import Operator, Tensor, TfliteModel

TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # the channels of images
CODES = ("int8", "uint8")  # types of quantised values
MOST_SETTINGS = 64  # numbers in a constant that says what an operator does
FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Padded:
    """A value with zeros around it, which is made only if somebody wants it so."""

    source: int
    before: tuple[int, ...]
    after: tuple[int, ...]


class Translation:
    """Nodes of ONNX, as operators are added.

    Args:
        model: whose operators they are.
        reader: of its file.

    Attributes:
        padded: values that PAD makes.
        flattened: images of which a matrix has a row for each.
        nodes: so far, in order.
        weights: constants that are in the file, as `OnnxModel` has them.
        inline: small ones that are not.
    """

    def __init__(self, model: TfliteModel, reader: TensorReader) -> None:
        self._model, self._reader = model, reader
        self.padded: dict[int, Padded] = {}
        self.flattened: dict[int, int] = {}
        self.nodes: list[Any] = []
        self.weights: dict[str, tuple[TensorInfo, int]] = {}
        self.inline: dict[str, Any] = {}
        self._versions: dict[tuple[int, bool], str] = {}
        self._reals: dict[tuple[int, bool], str] = {}
        self._names = {one.name for one in model.tensors}
        for one in model.tensors:
            if one.place is not None:
                self.weights[one.name] = (one.place, elem_type(one))
                self._versions[one.index, False] = one.name
        for index in model.inputs:
            self._versions[index, False] = model.tensors[index].name

    def tensor(self, index: int) -> Tensor:
        """One of the model's."""
        return self._model.tensors[index]

    def fresh(self, name: str) -> str:
        """A name that nothing has yet: this one, or about it."""
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}:{count}"
        self._names.add(found)
        return found

    def node(self, op: str, inputs: Sequence[str], y: str, **attributes: Any) -> str:
        """Add one; gives y, its output's name."""
        self.nodes.append(helper.make_node(op, list(inputs), [y], name=y, **attributes))
        return y

    def constant(self, name: str, value: np.ndarray) -> str:
        """A small one; gives its name, which is about the given one."""
        found = self.fresh(name)
        self.inline[found] = numpy_helper.from_array(value, found)
        return found

    def reshaped(self, x: str, shape: Sequence[int], y: str) -> str:
        """The same elements in another shape."""
        return self.node("Reshape", [x, self.constant(f"{y}/shape", np.array(shape, np.int64))], y)

    def settings(self, operator: Operator, place: int) -> list[int]:
        """Numbers of a small constant that is an operator's input.

        Raises:
            UnsupportedError: it is made at run time.
            ModelFileError: it is missing, or has many.
        """
        one = self.tensor(input_of(operator, place))
        if one.place is None or one.type not in ("int32", "int64"):
            raise operator.unsupported(
                f"{one.name!r} is no constant of int32 or int64, and others are not done"
            )
        kind = np.dtype(one.type)
        if one.place.n_bytes > MOST_SETTINGS * kind.itemsize:
            raise operator.bad(f"{one.name!r} has {one.place.n_bytes} bytes")
        found = np.empty(one.place.n_bytes // kind.itemsize, kind)
        self._reader.readinto(one.place, 0, found.view(np.uint8))
        return [int(value) for value in found]

    # Versions of values

    def has_first(self, index: int) -> bool:
        """Whether an image is there with channels first, or is as easily made so."""
        if index in self.padded:
            return self.has_first(self.padded[index].source)
        return (index, True) in self._versions

    def codes(self, index: int, first: bool = False) -> str:
        """A value as its type says; `first`: an image with channels first."""
        key = index, first
        if key not in self._versions:
            self._versions[key] = self._other(self.tensor(index), first)
        return self._versions[key]

    def rename(self, index: int, name: str, first: bool = False) -> None:
        """Let a version of a value be what there is under this name."""
        self._versions[index, first] = name

    def _version_name(self, one: Tensor, first: bool) -> str:
        return self.fresh(f"{one.name}/channels_first") if first else one.name

    def _other(self, one: Tensor, first: bool) -> str:
        y = self._version_name(one, first)
        given = self._versions.get((one.index, not first))
        if given is None and not first and self.has_first(one.index):
            given = self.codes(one.index, True)  # nothing has to move before zeros are around it
        if given is None:
            return self._with_zeros(self.padded[one.index], one, y, first)
        if len(one.shape) == 4 and one.shape[1] * one.shape[2] != 1:
            return self.node("Transpose", [given], y, perm=TO_FIRST if first else TO_LAST)
        return self.reshaped(given, [one.shape[i] for i in TO_FIRST] if first else one.shape, y)

    def _with_zeros(self, padded: Padded, one: Tensor, y: str, first: bool) -> str:
        order = TO_FIRST if first else range(len(one.shape))
        pads = [ends[i] for ends in (padded.before, padded.after) for i in order]
        zero = 0 if one.quantisation is None else one.quantisation.zeros[0]
        inputs = [
            self.codes(padded.source, first),
            self.constant(f"{y}/pads", np.array(pads, np.int64)),
            self.constant(f"{y}/zero", np.array(zero, one.type)),
        ]
        return self.node("Pad", inputs, y)

    def real(self, index: int, first: bool = False) -> str:
        """A value as float32; `first`: an image with channels first."""
        one, key = self.tensor(index), (index, first)
        if one.type == "float32":
            return self.codes(index, first)
        if key not in self._reals:
            x = self.codes(index, first)
            y = self.fresh(f"{x}/real")
            if one.place is not None:
                self._reals[key] = self._real_constant(one, x, y)
            else:
                self._reals[key] = self.node("DequantizeLinear", [x, *self._scale(one)], y)
        return self._reals[key]

    def _real_constant(self, one: Tensor, x: str, y: str) -> str:
        """A constant as float32, which is computed when it is wanted."""
        of = one.quantisation
        if of is None:
            if one.type != "float16":
                raise self._unsupported(one, "it has no scale")
            return self.node("Cast", [x], y, to=FLOAT)
        found = self.node("Cast", [x], self.fresh(f"{y}/codes"), to=FLOAT)
        shape = [1] * len(one.shape)
        if of.scales.size > 1:
            shape[of.axis] = -1
        if of.zeros.any():
            zeros = self.constant(f"{y}/zero", of.zeros.astype(np.float32).reshape(shape))
            found = self.node("Sub", [found, zeros], self.fresh(f"{y}/shifted"))
        return self.node("Mul", [found, self.constant(f"{y}/scale", of.scales.reshape(shape))], y)

    def _unsupported(self, one: Tensor, message: str) -> UnsupportedError:
        return UnsupportedError(
            f"{one.type}, and {message}; of such values {' and '.join(CODES)} with one scale are "
            "done", path=self._model.path, tensor=one.name,
        )  # fmt: skip

    def _scale(self, one: Tensor, whole: bool = False) -> list[str]:
        """Names of scale and zero point; `whole`: of constants, which may have several."""
        of = one.quantisation
        if of is None or one.type not in CODES:
            raise self._unsupported(one, "it is used as a number")
        if of.scales.size > 1 and not whole:
            raise self._unsupported(one, f"it has {of.scales.size} scales")
        shape = () if of.scales.size == 1 else (-1,)
        return [
            self.constant(f"{one.name}/scale", of.scales.reshape(shape)),
            self.constant(f"{one.name}/zero", of.zeros.astype(one.type).reshape(shape)),
        ]

    # What operators make

    def make(
        self, index: int, op: str, inputs: Sequence[str], *, first: bool = False,
        activation: str = "NONE", **attributes: Any,
    ) -> None:  # fmt: skip
        """A value out of numbers: an operator, an activation, and codes if the value is quantised.

        Args:
            index: of the value.
            op, inputs, attributes: of ONNX, of float32; "" of op: the one input as it is.
            first: the result has its channels first: [images, channels, rows, columns].
            activation: of TFLite.
        """
        one = self.tensor(index)
        steps: list[tuple[str, list[str], dict[str, Any]]] = []
        before = list(inputs)
        if op:
            steps.append((op, [], attributes))
        if activation == "RELU":
            steps.append(("Relu", [], {}))
        elif activation != "NONE":
            least, most = BOUNDS[activation]
            bounds = [self.constant(f"{one.name}/{end}", np.array(value, np.float32))
                      for end, value in (("least", least), ("most", most))]  # fmt: skip
            steps.append(("Clip", bounds, {}))
        if one.type != "float32":
            steps.append(("QuantizeLinear", self._scale(one), {}))
        y = self._version_name(one, first)
        for i, (name, more, given) in enumerate(steps):
            last = i + 1 == len(steps)
            made = y if last else self.fresh(f"{y}/{name}")
            before = [self.node(name, [*before, *more], made, **given)]
        self._versions[index, first] = y

    def move(self, index: int, op: str, inputs: Sequence[str], *, first: bool = False,
             **attributes: Any) -> None:  # fmt: skip
        """A value out of others, whose codes or numbers stay as they are."""
        y = self._version_name(self.tensor(index), first)
        self._versions[index, first] = self.node(op, inputs, y, **attributes)

    def view(self, index: int, x: int, first: bool) -> None:
        """A value that has the elements of another one's version, in their order."""
        one = self.tensor(index)
        self._versions[index, False] = self.reshaped(self.codes(x, first), one.shape, one.name)

    def same_codes(self, a: int, b: int) -> bool:
        """Whether codes of one value mean the same as those of another."""
        one, other = self.tensor(a), self.tensor(b)
        if one.type != other.type:
            return False
        of, to = one.quantisation, other.quantisation
        if of is None or to is None:
            return of is to
        return bool(np.array_equal(of.scales, to.scales) and np.array_equal(of.zeros, to.zeros))

    def weights_of(
        self, operator: Operator, index: int, x: int, shape: Sequence[int], perm: Sequence[int]
    ) -> str:
        """Weights in ONNX's order, the dimension of what is written first.

        Args:
            index: of the weights.
            x: what they multiply; if it is not quantised, they are numbers.
            shape: of the file's, which may have been put together.
            perm: dimensions of that in ONNX's order.
        """
        one = self.tensor(index)
        quantised = one.type in CODES and self.tensor(x).type in CODES
        found = self.codes(index) if quantised else self.real(index)
        if tuple(shape) != one.shape:
            found = self.reshaped(found, shape, self.fresh(f"{one.name}/reshaped"))
        if list(perm) != sorted(perm):
            turned = self.fresh(f"{one.name}/turned")
            found = self.node("Transpose", [found], turned, perm=perm)
        if not quantised:
            return found
        of = one.quantisation
        if of is not None and of.scales.size > 1 and perm[0] != of.axis:
            raise operator.unsupported(
                f"scales of {one.name!r} are those of dimension {of.axis}, and it writes {perm[0]}"
            )
        made = self.fresh(f"{one.name}/real")
        return self.node("DequantizeLinear", [found, *self._scale(one, True)], made, axis=0)

    def bias_of(self, operator: Operator, place: int, weights: int, x: int) -> list[str]:
        """The name of a bias as numbers; none: there is none."""
        if place >= len(operator.inputs) or operator.inputs[place] < 0:
            return []
        index = operator.inputs[place]
        one = self.tensor(index)
        if one.type == "float32" or (one.type == "float16" and one.place is not None):
            return [self.real(index)]
        of, factors = self.tensor(x).quantisation, self.tensor(weights).quantisation
        if one.type != "int32" or one.place is None or of is None or factors is None:
            raise operator.unsupported(
                f"its bias {one.name!r} is {one.type}; float32 is done, and constants of int32 "
                "where all else is quantised"
            )
        # TFLite adds these codes to the sums of products: their unit is that of products.
        unit = of.scales[0] * factors.scales
        scale = self.constant(f"{one.name}/scale", unit.reshape(() if unit.size == 1 else (-1,)))
        made = self.fresh(f"{one.name}/real")
        return [self.node("DequantizeLinear", [one.name, scale], made, axis=0)]


BOUNDS = {"RELU_N1_TO_1": (-1.0, 1.0), "RELU6": (0.0, 6.0)}


def elem_type(one: Tensor) -> int:
    """ONNX's number of a tensor's type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(one.type)))


def input_of(operator: Operator, place: int) -> int:
    """The tensor that an operator reads there.

    Raises:
        ModelFileError: it does not have that many.
    """
    if place >= len(operator.inputs) or operator.inputs[place] < 0:
        raise operator.bad(f"its input {place} is missing")
    return operator.inputs[place]
