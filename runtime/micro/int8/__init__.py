"""Layers of int8 codes: what they compute, and the calls of kernels that compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headrace.micro.int8 import (
    activation,
    add,
    convolution,
    depthwise,
    multiply,
    pool,
    softmax,
    sums,
)
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
    Sums,
)
from headrace.targets.target import Target

# (layer, target, *int8 codes of what it reads) -> int8 codes of what it makes: all chips the same.
COMPUTED: Mapping[type[Layer], Callable[..., np.ndarray]] = {
    Activation: activation.computed,
    Add: add.computed,
    Convolution: convolution.computed,
    Depthwise: depthwise.computed,
    Multiply: multiply.computed,
    Pool: pool.computed,
    Softmax: softmax.computed,
    Sums: sums.computed,
}
LOWERED: Mapping[type[Layer], Callable[[Any, Target], Lowered]] = {
    Activation: activation.lowered,
    Add: add.lowered,
    Convolution: convolution.lowered,
    Depthwise: depthwise.lowered,
    Multiply: multiply.lowered,
    Pool: pool.lowered,
    Softmax: softmax.lowered,
    Sums: sums.lowered,
}
