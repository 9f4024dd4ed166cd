"""What layers of int8 codes compute, by their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headrace.micro.int8 import activation, add, convolution, depthwise, pool, softmax, view
from headrace.micro.network import (
    Activation,
    Add,
    Convolution,
    Depthwise,
    Layer,
    Pool,
    Softmax,
    View,
)

# (layer, *int8 codes of what it reads) -> int8 codes of what it makes, in numpy.
COMPUTED: Mapping[type[Layer], Callable[..., np.ndarray]] = {
    Activation: activation.computed,
    Add: add.computed,
    Convolution: convolution.computed,
    Depthwise: depthwise.computed,
    Pool: pool.computed,
    Softmax: softmax.computed,
    View: view.computed,
}
