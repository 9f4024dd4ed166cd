"""TFLite files with a batch of one, whose outputs of TensorFlow Lite Micro are in tests/data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tflite_files import RELU, SAME, VALID, TfliteFile
from tflite_networks import CASES, Kind, conv, residual

Ends = tuple[int, int]  # an input and an output


def _function(op: str, scale: float, zero: int, **options: Any) -> Callable[..., Ends]:
    """A function of all codes."""

    def build(file: TfliteFile, kind: Kind) -> Ends:
        x = file.tensor((1, 256), "int8", scale=0.06, zero=-7)
        y = file.tensor((1, 256), "int8", scale=scale, zero=zero)
        return x, file.operator(op, [x], [y], **options)

    return build


def _pool(op: str) -> Callable[..., Ends]:
    def build(file: TfliteFile, kind: Kind) -> Ends:
        x = kind.value(file, (1, 7, 9, 18))
        # A convolution in front says that the input is an image.
        a = conv(file, kind, x, (18, 1, 1, 18), (1, 7, 9, 18))
        y = kind.value(file, (1, 4, 5, 18), 0.1)
        return x, file.operator(op, [a], [y], b0=SAME, i1=2, i2=2, i3=3, i4=2)

    return build


def _mean(scale: float, *, keep: bool = False, pixels: tuple[int, int] = (6, 5)) -> Any:
    """Of an image whose codes have a scale of 0.1."""

    def build(file: TfliteFile, kind: Kind) -> Ends:
        x = kind.value(file, (1, *pixels, 20))
        a = conv(file, kind, x, (20, 1, 1, 20), (1, *pixels, 20))
        axes = file.constant(np.array([1, 2], np.int32))
        y = kind.value(file, (1, 1, 1, 20) if keep else (1, 20), scale)
        return x, file.operator("MEAN", [a, axes], [y], b0=int(keep))

    return build


def _product(by_channel: bool) -> Callable[..., Ends]:
    def build(file: TfliteFile, kind: Kind) -> Ends:
        shape = (1, 6, 5, 20)
        x = kind.value(file, shape)
        a = conv(file, kind, x, (20, 1, 1, 20), shape, 0.07)
        if by_channel:
            b = kind.value(file, (1, 1, 1, 20), 0.07)
            options = {"b0": VALID, "i1": 1, "i2": 1, "i3": 5, "i4": 6, "b5": 0}
            file.operator("AVERAGE_POOL_2D", [a], [b], **options)
        else:
            b = x
        return x, file.operator("MUL", [a, b], [kind.value(file, shape, 0.02)], b0=RELU)

    return build


def _around(file: TfliteFile, kind: Kind) -> Ends:
    """Zeros that a convolution and somebody else read."""
    x = kind.value(file, (1, 5, 6, 8))
    a = conv(file, kind, x, (8, 1, 1, 8), (1, 5, 6, 8))
    pads = file.constant(np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32))
    wide = file.operator("PAD", [a, pads], [kind.value(file, (1, 8, 7, 8), 0.1)])
    b = conv(file, kind, wide, (8, 3, 3, 8), (1, 8, 7, 8), 0.2)
    return x, file.operator("ADD", [wide, b], [kind.value(file, (1, 8, 7, 8), 0.2)], b0=0)


def _in_floats(file: TfliteFile, kind: Kind) -> Ends:
    """A last layer of numbers, as converters leave it."""
    x = kind.value(file, (1, 21))
    w = kind.weights(file, (9, 21), 0)
    y = kind.value(file, (1, 9), 0.1)
    file.operator("FULLY_CONNECTED", [x, w, kind.bias(file, 9, x, w)], [y], b0=0)
    numbers = file.operator("DEQUANTIZE", [y], [file.tensor((1, 9), "float32")])
    return x, file.operator("SOFTMAX", [numbers], [file.tensor((1, 9), "float32")], f0=1.0)


def _softmax(file: TfliteFile, kind: Kind) -> Ends:
    x = kind.value(file, (1, 21))
    return x, file.operator(
        "SOFTMAX", [x], [file.tensor((1, 21), "int8", scale=1 / 256, zero=-128)], f0=1.0
    )


MICRO: dict[str, Callable[[TfliteFile, Kind], Ends]] = {
    **{name: CASES[name] for name in ("dilated", "depthwise", "multiplied", "pixels", "padded")},
    **{name: CASES[name] for name in ("sum", "turned", "ending in zeros")},
    **{name: CASES[name] for name in ("softmax of pixels", "softmax of boxes", "boxes")},
    "average": _pool("AVERAGE_POOL_2D"),
    "most": _pool("MAX_POOL_2D"),
    "mean": _mean(0.02),
    "mean of the same codes": _mean(0.1),
    "mean kept": _mean(0.1, keep=True),
    "mean kept, 7 pixels": _mean(0.1, keep=True, pixels=(7, 1)),
    "mean kept, 49 pixels": _mean(0.1, keep=True, pixels=(7, 7)),
    "mean of other codes kept": _mean(0.05, keep=True),
    "joined": CASES["joined"],
    "product": _product(False),
    "product by channel": _product(True),
    "around": _around,
    "in floats": _in_floats,
    "softmax": _softmax,
    "sigmoid": _function("LOGISTIC", 1 / 256, -128),
    "tanh": _function("TANH", 1 / 128, 0),
    "hard_swish": _function("HARD_SWISH", 0.05, -100),
    "leaky_relu": _function("LEAKY_RELU", 0.03, 12, f0=0.1),
}


def micro_network(case: str) -> tuple[bytes, np.ndarray]:
    """A file, and inputs."""
    if case == "residual":
        (file, x, y), _ = residual()
        inputs = np.random.default_rng(9).integers(-128, 128, (8, 1, 20, 12, 3)).astype(np.int8)
        return file.bytes([x], [y]), inputs
    file, kind = TfliteFile(), Kind("int8")
    x, y = MICRO[case](file, kind)
    if file.tensors[x]["shape"] == [1, 256]:
        inputs = np.arange(-128, 128, dtype=np.int8)[None, None]
    else:
        inputs = kind.input((3, *file.tensors[x]["shape"]))
    return file.bytes([x], [y]), inputs
