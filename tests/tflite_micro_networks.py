"""TFLite files with a batch of one, whose outputs of TensorFlow Lite Micro are in tests/data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tflite_files import SAME, TfliteFile
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


def _mean(file: TfliteFile, kind: Kind) -> Ends:
    x = kind.value(file, (1, 6, 5, 20))
    a = conv(file, kind, x, (20, 1, 1, 20), (1, 6, 5, 20))
    axes = file.constant(np.array([1, 2], np.int32))
    return x, file.operator("MEAN", [a, axes], [kind.value(file, (1, 20), 0.02)])


def _softmax(file: TfliteFile, kind: Kind) -> Ends:
    x = kind.value(file, (1, 21))
    return x, file.operator(
        "SOFTMAX", [x], [file.tensor((1, 21), "int8", scale=1 / 256, zero=-128)], f0=1.0
    )


MICRO: dict[str, Callable[[TfliteFile, Kind], Ends]] = {
    **{name: CASES[name] for name in ("dilated", "depthwise", "multiplied", "pixels", "padded")},
    **{name: CASES[name] for name in ("sum", "turned")},
    "average": _pool("AVERAGE_POOL_2D"),
    "most": _pool("MAX_POOL_2D"),
    "mean": _mean,
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
