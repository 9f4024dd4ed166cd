"""Small networks as TFLite files: one operator, and a residual network of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tflite_files import RELU, RELU6, SAME, VALID, TfliteFile

Made = tuple[TfliteFile, int, int]  # a file, its input and its output


class Kind:
    """Values of one type: float32, or codes with scales that use all of them."""

    def __init__(self, dtype: str, seed: int = 0) -> None:
        self.dtype, self.codes = dtype, dtype != "float32"
        self.random = np.random.default_rng(seed)
        self.middle = {"int8": -7, "uint8": 121}.get(dtype, 0)
        self.least = -128 if dtype == "int8" else 0

    def value(self, file: TfliteFile, shape: Any, scale: float = 0.05, **more: Any) -> int:
        """A value of this type."""
        of = {"scale": scale, "zero": self.middle} if self.codes else {}
        return file.tensor(shape, self.dtype, **of, **more)

    def weights(self, file: TfliteFile, shape: Any, axis: int, gain: float = 1.0) -> int:
        """Weights, of bytes with a scale for each channel (int8) or one (uint8)."""
        if not self.codes:
            return file.constant(self.random.normal(size=shape).astype(np.float32) * (0.2 * gain))
        if self.dtype == "uint8":
            w = self.random.integers(0, 256, shape).astype(np.uint8)
            return file.constant(w, scale=0.004 * gain, zero=131)
        w = self.random.integers(-127, 128, shape).astype(np.int8)
        scales = self.random.uniform(0.002, 0.006, shape[axis]) * gain
        return file.constant(w, scale=scales, axis=axis)

    def bias(self, file: TfliteFile, count: int, x: int, w: int) -> int:
        """A bias in units of the products."""
        if not self.codes:
            return file.constant(self.random.normal(size=count).astype(np.float32))
        scales = np.float32(file.tensors[x]["scale"]) * np.float32(file.tensors[w]["scale"])
        codes = self.random.integers(-3000, 3000, count).astype(np.int32)
        return file.constant(codes, scale=scales)

    def input(self, shape: Any) -> np.ndarray:
        """Random numbers or codes."""
        if not self.codes:
            return self.random.normal(size=shape).astype(np.float32)
        ends = np.iinfo(self.dtype)
        return self.random.integers(ends.min, ends.max + 1, shape).astype(self.dtype)


def conv(
    file: TfliteFile,
    kind: Kind,
    x: int,
    w_shape: Any,
    shape: Any,
    scale: float = 0.1,
    **options: Any,
) -> int:
    """CONV_2D; options over strides of 1, SAME, ReLU."""
    w = kind.weights(file, w_shape, 0)
    inputs = [x, w, kind.bias(file, w_shape[0], x, w)]
    given = {"b0": SAME, "i1": 1, "i2": 1, "b3": RELU, "i4": 1, "i5": 1} | options
    return file.operator("CONV_2D", inputs, [kind.value(file, shape, scale)], **given)


def depthwise(
    file: TfliteFile,
    kind: Kind,
    x: int,
    w_shape: Any,
    shape: Any,
    scale: float = 0.1,
    **options: Any,
) -> int:
    """DEPTHWISE_CONV_2D; options over strides of 1, SAME, ReLU6."""
    w = kind.weights(file, w_shape, 3)
    inputs = [x, w, kind.bias(file, w_shape[3], x, w)]
    given = {"b0": SAME, "i1": 1, "i2": 1, "i3": 1, "b4": RELU6, "i5": 1, "i6": 1} | options
    return file.operator("DEPTHWISE_CONV_2D", inputs, [kind.value(file, shape, scale)], **given)


def _pool(name: str, **options: int) -> Callable[[TfliteFile, Kind], tuple[int, int]]:
    def build(file: TfliteFile, kind: Kind) -> tuple[int, int]:
        x = kind.value(file, (2, 7, 9, 18))
        shape = (2, 4, 5, 18) if options["b0"] == SAME else (2, 3, 4, 18)
        return x, file.operator(name, [x], [kind.value(file, shape)], b5=0, **options)

    return build


def _conv(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (2, 9, 8, 19))
    return x, conv(file, kind, x, (21, 3, 2, 19), (2, 5, 4, 21), i1=2, i2=2)


def _dilated(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 9, 10, 6))
    return x, conv(file, kind, x, (8, 3, 3, 6), (1, 5, 8, 8), b0=VALID, b3=0, i4=1, i5=2)


def _depthwise(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 10, 7, 24))
    return x, depthwise(file, kind, x, (1, 3, 3, 24), (1, 5, 4, 24), i1=2, i2=2)


def _multiplied(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 6, 5, 3))
    return x, depthwise(file, kind, x, (1, 2, 3, 12), (1, 6, 5, 12), i3=4)


def _rows(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (3, 40))
    w = kind.weights(file, (17, 40), 0)
    y = kind.value(file, (3, 17), 0.1)
    return x, file.operator("FULLY_CONNECTED", [x, w, kind.bias(file, 17, x, w)], [y], b0=RELU)


def _pixels(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    """A matrix times all of an image."""
    x = kind.value(file, (1, 6, 5, 8))
    y = conv(file, kind, x, (9, 3, 3, 8), (1, 6, 5, 9))
    flat = kind.value(file, (1, 270), 0.1)
    file.operator("RESHAPE", [y, file.constant(np.array([1, 270], np.int32))], [flat])
    w = kind.weights(file, (7, 270), 0)
    z = kind.value(file, (1, 7), 0.6)
    return x, file.operator("FULLY_CONNECTED", [flat, w, kind.bias(file, 7, flat, w)], [z], b0=0)


def _padded(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    """PAD that a convolution takes over."""
    x = kind.value(file, (1, 8, 8, 16))
    pads = file.constant(np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32))
    wide = file.operator("PAD", [x, pads], [kind.value(file, (1, 11, 9, 16))])
    return x, conv(file, kind, wide, (20, 3, 3, 16), (1, 9, 7, 20), b0=VALID)


def _pad(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 3, 4, 5))
    pads = file.constant(np.array([[0, 0], [1, 2], [0, 1], [3, 0]], np.int32))
    return x, file.operator("PAD", [x, pads], [kind.value(file, (1, 6, 5, 8))])


def _mean(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (2, 6, 5, 20))
    axes = file.constant(np.array([1, 2], np.int32))
    return x, file.operator("MEAN", [x, axes], [kind.value(file, (2, 20), 0.02)])


def _sum(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 6, 5, 20))
    other = conv(file, kind, x, (20, 1, 1, 20), (1, 6, 5, 20), 0.07)
    return x, file.operator("ADD", [other, x], [kind.value(file, (1, 6, 5, 20), 0.12)], b0=RELU)


def _constant_sum(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 6, 5, 20))
    y = conv(file, kind, x, (20, 1, 1, 20), (1, 6, 5, 20), 0.07)
    of = {"scale": 0.02, "zero": kind.middle} if kind.codes else {}
    c = file.constant(kind.input((20,)), **of)
    return x, file.operator("ADD", [y, c], [kind.value(file, (1, 6, 5, 20), 0.12)], b0=0)


def _softmax(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (3, 21))
    more = {"scale": 1 / 256, "zero": kind.least} if kind.codes else {}
    y = file.tensor((3, 21), kind.dtype, **more)
    return x, file.operator("SOFTMAX", [x], [y], f0=1.0)


def _of_pixels(*, boxes: bool) -> Callable[[TfliteFile, Kind], tuple[int, int]]:
    """A softmax of each pixel's channels; boxes: pixels of all rows are in one."""

    def build(file: TfliteFile, kind: Kind) -> tuple[int, int]:
        x = kind.value(file, (1, 6, 5, 3))
        logits = conv(file, kind, x, (7, 3, 3, 3), (1, 6, 5, 7), 0.05, b3=0)
        shape = (1, 30, 7) if boxes else (1, 6, 5, 7)
        if boxes:
            sizes = file.constant(np.array(shape, np.int32))
            logits = file.operator("RESHAPE", [logits, sizes], [kind.value(file, shape)])
        more = {"scale": 1 / 256, "zero": kind.least} if kind.codes else {}
        y = file.tensor(shape, kind.dtype, **more)
        return x, file.operator("SOFTMAX", [logits], [y], f0=1.0)

    return build


def _ending_in_zeros(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    """Zeros that no convolution reads."""
    x = kind.value(file, (1, 6, 5, 3))
    y = conv(file, kind, x, (7, 3, 3, 3), (1, 6, 5, 7))
    pads = file.constant(np.array([[0, 0], [1, 0], [2, 1], [0, 0]], np.int32))
    return x, file.operator("PAD", [y, pads], [kind.value(file, (1, 7, 8, 7), 0.1)])


def _boxes(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    """Of images of two sizes, one behind the other."""
    x = kind.value(file, (1, 6, 4, 3))
    fine = conv(file, kind, x, (8, 3, 3, 3), (1, 6, 4, 8))
    coarse = conv(file, kind, fine, (8, 3, 3, 8), (1, 3, 2, 8), i1=2, i2=2)
    boxes = []
    for image, shape in ((fine, (1, 48, 4)), (coarse, (1, 12, 4))):
        sizes = file.constant(np.array(shape, np.int32))
        boxes.append(file.operator("RESHAPE", [image, sizes], [kind.value(file, shape, 0.1)]))
    y = kind.value(file, (1, 60, 4), 0.1)
    return x, file.operator("CONCATENATION", boxes, [y], i0=1, b1=0)


def _joined(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 4, 5, 16))
    a = conv(file, kind, x, (16, 1, 1, 16), (1, 4, 5, 16), 0.05)
    y = file.operator("CONCATENATION", [a, x], [kind.value(file, (1, 4, 5, 32))], i0=3, b1=0)
    return x, conv(file, kind, y, (8, 1, 1, 32), (1, 4, 5, 8))


def _bounded(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    x = kind.value(file, (1, 4, 5, 16))
    y = file.operator("RELU6", [x], [kind.value(file, (1, 4, 5, 16))])
    return x, file.operator("RELU", [y], [kind.value(file, (1, 4, 5, 16))])


def _turned(file: TfliteFile, kind: Kind) -> tuple[int, int]:
    """A network of PyTorch's, whose input has channels first."""
    x = kind.value(file, (1, 16, 4, 6))
    perm = file.constant(np.array([0, 2, 3, 1], np.int32))
    y = file.operator("TRANSPOSE", [x, perm], [kind.value(file, (1, 4, 6, 16))])
    return x, conv(file, kind, y, (16, 3, 3, 16), (1, 4, 6, 16))


CASES: dict[str, Callable[[TfliteFile, Kind], tuple[int, int]]] = {
    "conv": _conv, "dilated": _dilated, "depthwise": _depthwise, "multiplied": _multiplied,
    "rows": _rows, "pixels": _pixels, "padded": _padded, "pad": _pad, "mean": _mean, "sum": _sum,
    "constant sum": _constant_sum, "softmax": _softmax, "joined": _joined, "bounded": _bounded,
    "turned": _turned, "softmax of pixels": _of_pixels(boxes=False),
    "softmax of boxes": _of_pixels(boxes=True), "ending in zeros": _ending_in_zeros,
    "boxes": _boxes,
    "average": _pool("AVERAGE_POOL_2D", b0=VALID, i1=2, i2=2, i3=3, i4=3),
    "average, same": _pool("AVERAGE_POOL_2D", b0=SAME, i1=2, i2=2, i3=3, i4=2),
    "most": _pool("MAX_POOL_2D", b0=SAME, i1=2, i2=2, i3=3, i4=2),
}  # fmt: skip


def made(case: str, dtype: str) -> tuple[Made, np.ndarray]:
    """A file with one operator (or a few), and an input."""
    file, kind = TfliteFile(), Kind(dtype)
    x, y = CASES[case](file, kind)
    return (file, x, y), kind.input(file.tensors[x]["shape"])


def residual(dtype: str = "int8", classes: int = 12) -> tuple[Made, np.ndarray]:
    """A residual network with all kinds of layers that MLPerf Tiny's have, and an input."""
    file, kind = TfliteFile(), Kind(dtype, 3)
    x = kind.value(file, (1, 20, 12, 3), 0.02, name="image")
    a = conv(file, kind, x, (16, 3, 3, 3), (1, 10, 6, 16), 0.03, i1=2, i2=2)
    b = depthwise(file, kind, a, (1, 3, 3, 16), (1, 10, 6, 16), 0.03)
    c = conv(file, kind, b, (16, 1, 1, 16), (1, 10, 6, 16), 0.03, b3=0)
    # No simple ratio of scales: sums would often lie in the middle, where libraries differ.
    d = file.operator("ADD", [c, a], [kind.value(file, (1, 10, 6, 16), 0.0413)], b0=RELU)
    e = conv(file, kind, d, (24, 1, 1, 16), (1, 10, 6, 24), 0.03)
    pooled = kind.value(file, (1, 1, 1, 24), 0.03)
    file.operator("AVERAGE_POOL_2D", [e], [pooled], b0=VALID, i1=6, i2=10, i3=6, i4=10, b5=0)
    shape = file.constant(np.array([1, 24], np.int32))
    flat = file.operator("RESHAPE", [pooled, shape], [kind.value(file, (1, 24), 0.03)])
    w = kind.weights(
        file, (classes, 24), 0, 0.25
    )  # one code of `flat` is less than one of `logits`
    logits = kind.value(file, (1, classes), 0.02)
    inputs = [flat, w, kind.bias(file, classes, flat, w)]
    file.operator("FULLY_CONNECTED", inputs, [logits], b0=0)
    of = {"scale": 1 / 256, "zero": 0 if dtype == "uint8" else -128} if kind.codes else {}
    y = file.tensor((1, classes), dtype, name="scores", **of)
    file.operator("SOFTMAX", [logits], [y], f0=1.0)
    return (file, x, y), kind.input((1, 20, 12, 3))
