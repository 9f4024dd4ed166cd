"""A small network as data: layers in order, of images that lie pixel by pixel (NHWC), batch 1.

Values are int8 codes where the file is quantised, else real numbers, which a program keeps as
halves; numbers between codes, or behind them, are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from headrace.errors import UnsupportedError

UNSIGNED_ZERO = 128  # taken from codes of files that have unsigned ones
UNBOUNDED = (-math.inf, math.inf)
OWN = "\0"  # in names that planners give, and no network has


@dataclass(frozen=True)
class Codes:
    """How int8 codes stand for numbers: (code - zero) * scale."""

    scale: float
    zero: int


@dataclass(frozen=True)
class Value:
    """What a layer reads or makes.

    Attributes:
        shape: [rows, columns, channels] of an image, [channels] of a vector.
        codes: of int8; None: it is a real number.
        sums: of int32 sums of products, whose codes nobody knows: float32 [channels], what they are
            multiplied by; None: it is none.
        wide: a real number is float32, and no half.
    """

    name: str
    shape: tuple[int, ...]
    codes: Codes | None
    sums: np.ndarray | None = field(default=None, compare=False)
    wide: bool = False

    @property
    def elements(self) -> int:
        """All of them."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements on a chip."""
        if self.sums is not None:
            return np.dtype(np.int32)
        return np.dtype(np.int8 if self.codes else np.float32 if self.wide else np.float16)

    @property
    def n_bytes(self) -> int:
        """Of all elements on a chip."""
        return self.elements * self.dtype.itemsize

    @property
    def image(self) -> tuple[int, int, int]:
        """Rows, columns and channels; a vector is one pixel."""
        rows, columns, channels = (1, 1, *self.shape)[-3:]
        return rows, columns, channels


@dataclass(frozen=True)
class Windows:
    """Where a layer looks at for each pixel that it makes; pairs are of rows and columns.

    Attributes:
        pads: pixels above and to the left of the image that count as zeros; as many as are needed
            are below and to the right.
    """

    taps: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def is_pixelwise(self) -> bool:
        """Whether a pixel is made of the one in the same place."""
        return self == Windows()


@dataclass(frozen=True, eq=False)
class Layer:
    """What makes one value out of others.

    Attributes:
        name: of the file.
        reads: values, in order.
        makes: the value.
    """

    name: str
    reads: tuple[Value, ...]
    makes: Value

    @property
    def macs(self) -> int:
        """Multiply-adds of weights."""
        return 0


@dataclass(frozen=True, eq=False)
class Convolution(Layer):
    """A convolution; one of a single pixel is a fully connected layer.

    Attributes:
        weights: [made, rows, columns, read], int8 or float32.
        bias: [made], int32 in units of the products, or float32.
        scales: [made], of int8 weights; None: they are numbers.
        bounds: of what it makes, as real numbers.
    """

    weights: np.ndarray
    bias: np.ndarray
    scales: np.ndarray | None
    windows: Windows
    bounds: tuple[float, float] = UNBOUNDED

    @property
    def is_of_sums(self) -> bool:
        """Whether it makes numbers of one row of codes."""
        of_codes = self.reads[0].codes is not None and self.makes.codes is None
        single = self.makes.image[:2] == (1, 1) and self.weights[0].size == self.reads[0].elements
        return of_codes and single and self.scales is not None

    @property
    def macs(self) -> int:
        """Those with pads, too."""
        rows, columns, _ = self.makes.image
        return rows * columns * self.weights.size


@dataclass(frozen=True, eq=False)
class Sums(Layer):
    """A fully connected layer of codes whose result stays sums of products.

    Attributes:
        weights: int8 [made, read].
        bias: int32 [made].
    """

    weights: np.ndarray
    bias: np.ndarray

    @property
    def macs(self) -> int:
        """One for each weight."""
        return self.weights.size


@dataclass(frozen=True, eq=False)
class Depthwise(Layer):
    """A convolution of each channel for itself.

    Attributes:
        weights: [rows, columns, made], int8 or float32; made channel i reads channel
            i // (made / read).
        bias, scales, bounds: as of `Convolution`.
        whole: rows and columns that the layer makes, where this makes some of its rows: sums are
            taken in an order that may depend on them.
    """

    weights: np.ndarray
    bias: np.ndarray
    scales: np.ndarray | None
    windows: Windows
    bounds: tuple[float, float] = UNBOUNDED
    whole: tuple[int, int] | None = None

    @property
    def macs(self) -> int:
        """Those with pads, too."""
        rows, columns, _ = self.makes.image
        return rows * columns * self.weights.size


@dataclass(frozen=True, eq=False)
class Pool(Layer):
    """The mean or the most of a window's pixels that are in the image, channel by channel.

    Attributes:
        of_numbers: a mean is rounded as one of numbers, also where codes stay the same.
    """

    kind: Literal["mean", "most"]
    windows: Windows
    bounds: tuple[float, float] = UNBOUNDED
    of_numbers: bool = False


@dataclass(frozen=True, eq=False)
class Add(Layer):
    """The sum of two values of one shape."""

    bounds: tuple[float, float] = UNBOUNDED


@dataclass(frozen=True, eq=False)
class Multiply(Layer):
    """The product of two values of one shape, or of an image and a factor for each channel."""

    bounds: tuple[float, float] = UNBOUNDED

    @property
    def is_by_channel(self) -> bool:
        """Whether the second value is a single pixel, for many."""
        return self.reads[0].elements != self.reads[1].elements


@dataclass(frozen=True, eq=False)
class Concatenation(Layer):
    """Values one behind the other.

    Attributes:
        axis: of the shapes that they have here.
    """

    axis: int = 0


@dataclass(frozen=True, eq=False)
class Padding(Layer):
    """An image with zeros around it.

    Attributes:
        before, after: rows and columns of zeros.
    """

    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Activation(Layer):
    """A function of each element.

    Attributes:
        kind: "identity" is there for its bounds, or for other codes.
        slope: of LeakyRelu below 0.
    """

    kind: Literal["identity", "hard_swish", "hard_sigmoid", "sigmoid", "tanh", "leaky_relu"]
    bounds: tuple[float, float] = UNBOUNDED
    slope: float = 0.0


@dataclass(frozen=True, eq=False)
class Softmax(Layer):
    """Of each pixel's channels.

    Attributes:
        beta: what they are multiplied by.
    """

    beta: float = 1.0


@dataclass(frozen=True, eq=False)
class Conversion(Layer):
    """The same as another kind of value: codes or sums as float32, or float32 as codes."""


@dataclass(frozen=True, eq=False)
class View(Layer):
    """The same elements in another shape: no work."""


@dataclass(frozen=True)
class Port:
    """An input or output as the file has it.

    Attributes:
        shape: of the file's, batch included.
        channels_first: whether the file has an image's channels first, where `value` has them last.
        is_real: whether the file has real numbers here, where `value` may have codes.
        is_unsigned: whether the file's codes are uint8.
    """

    name: str
    shape: tuple[int, ...]
    value: Value
    channels_first: bool = False
    is_real: bool = False
    is_unsigned: bool = False

    @property
    def type(self) -> str:
        """Of numpy, as the file has it."""
        return "float32" if self.is_real else "uint8" if self.is_unsigned else "int8"


@dataclass(frozen=True)
class MicroNetwork:
    """Layers in an order in which they can run.

    Attributes:
        name: for people.

    Raises:
        UnsupportedError: a name has a zero byte.
    """

    name: str
    layers: tuple[Layer, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __post_init__(self) -> None:
        names = [*(layer.name for layer in self.layers), *(value.name for value in self.values())]
        for name in names:
            if OWN in name:
                raise UnsupportedError(f"{name!r}: a name with a zero byte; rename it")

    @property
    def is_quantised(self) -> bool:
        """Whether values are int8 codes, or what is made of these."""
        return any(value.codes is not None for value in self.values())

    @property
    def macs(self) -> int:
        """Multiply-adds of all layers."""
        return sum(layer.macs for layer in self.layers)

    def last_reads(self) -> dict[str, int]:
        """The last layer that reads each value, by name; of outputs the place behind all."""
        found = {value.name: i for i, layer in enumerate(self.layers) for value in layer.reads}
        return found | {port.value.name: len(self.layers) for port in self.outputs}

    def values(self) -> Iterator[Value]:
        """All of them: inputs, then what layers make."""
        yield from (port.value for port in self.inputs)
        yield from (layer.makes for layer in self.layers)
