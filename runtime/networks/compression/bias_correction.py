"""Biases that make up for what rounding does to means.

Rounded weights and activations move the mean of each channel, and layers behind cannot tell that
from what they were trained on. Layer by layer, in the order of the network, the mean of a product
over all pixels and samples is brought back to what it is in float32; what comes behind sees it
corrected. Source: Nagel et al., "Data-free quantization through weight equalization and bias
correction" (2019), with samples in place of statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrace.networks.compression.float_model import Stepwise, observe
from headrace.networks.compression.qdq import Quantiser, Range
from headrace.networks.compression.samples import Sample


def correct(quantiser: Quantiser, ranges: Mapping[str, Range], samples: Sequence[Sample]) -> Any:
    """The quantised model with corrected biases.

    Raises:
        UnsupportedError: onnxruntime does not run it.
    """
    axes = {
        name: 1 if node.op_type == "Conv" else -1
        for name, node in quantiser.products().items()
        if node.op_type != "MatMul"  # it has no bias
    }
    sums: dict[str, np.ndarray] = {}

    def look(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + _means(value, axes[name])

    observe(quantiser.model, axes, samples, look)
    model, made = quantiser.write(ranges)
    run = Stepwise(model, samples)
    for name, axis in axes.items():
        value = made[name]
        run.run_to(value)
        found = sum(_means(values[value], axis) for values in run.values)
        missing = (sums[name] - found) / len(samples)
        quantiser.corrections[name] = missing
        for values in run.values:
            shape = [1] * values[value].ndim
            shape[axis] = -1
            values[value] = values[value] + missing.astype(np.float32).reshape(shape)
    return quantiser.write(ranges)[0]


def _means(value: np.ndarray, axis: int) -> np.ndarray:
    """Of each channel, in float64."""
    others = tuple(i for i in range(value.ndim) if i != axis % value.ndim)
    found: np.ndarray = value.mean(others, dtype=np.float64)
    return found
