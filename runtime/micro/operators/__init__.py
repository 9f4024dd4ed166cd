"""ONNX's operators as layers of microcontrollers: a function for each kind, and their table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from headrace.micro.operators import elements, places, products
from headrace.networks.graph import Node

_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMean")
OPERATORS: dict[str, Callable[[Any, Node], None]] = {
    "Conv": products.conv,
    "Gemm": products.gemm,
    "MatMul": products.gemm,
    **dict.fromkeys(_POOLS, products.pool),
    "Add": elements.add,
    "Mul": elements.multiply,
    **dict.fromkeys(("Sub", "Div"), elements.affine),
    "Concat": places.concat,
    "Pad": places.pad,
    **dict.fromkeys(("Relu", "Clip"), elements.bounded),
    "HardSwish": partial(elements.hard, kind="hard_swish"),
    "HardSigmoid": partial(elements.hard, kind="hard_sigmoid"),
    "Sigmoid": partial(elements.function, kind="sigmoid"),
    "Tanh": partial(elements.function, kind="tanh"),
    "LeakyRelu": elements.leaky,
    "Softmax": elements.softmax,
    "BatchNormalization": elements.batch_norm,
    "QuantizeLinear": places.quantize,
    "DequantizeLinear": places.dequantize,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), places.reshape),
    "Transpose": places.transpose,
    "Cast": places.cast,
    "Identity": places.identity,
    "Dropout": places.dropout,
}
