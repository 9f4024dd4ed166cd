"""Layers of real numbers on microcontrollers: in numpy bit for bit, and as calls of kernels.

Values are halves; the same in float32 (`kind="single"`) is what halves are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headrace.micro.half import convolution, depthwise, elementwise, multiply, pool, softmax
from headrace.micro.lowered import Lowered
from headrace.micro.network import (
    Activation,
    Add,
    Convolution,
    Depthwise,
    Layer,
    Multiply,
    Pool,
    Softmax,
)

_LAYERS: dict[type[Layer], Any] = {
    Convolution: convolution,
    Depthwise: depthwise,
    Pool: pool,
    Add: elementwise,
    Multiply: multiply,
    Activation: elementwise,
    Softmax: softmax,
}
# (layer, target, *values) -> what it makes; (layer, target) -> calls of kernels.
COMPUTED: Mapping[type[Layer], Callable[..., np.ndarray]] = {
    layer: module.computed for layer, module in _LAYERS.items()
}
LOWERED: Mapping[type[Layer], Callable[..., Lowered]] = {
    layer: module.lowered for layer, module in _LAYERS.items()
}
