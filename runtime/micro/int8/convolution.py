"""Convolutions and fully connected layers of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::ConvPerChannel` and `FullyConnected`.
"""

from __future__ import annotations

import numpy as np

from headrace.micro.fixed_point import multiplied
from headrace.micro.int8.codes import bounds_in_codes, codes_of, output_multipliers, shifted_bias
from headrace.micro.int8.windows import windows_of
from headrace.micro.network import Convolution, Depthwise


def rescaled(layer: Convolution | Depthwise, sums: np.ndarray) -> np.ndarray:
    """int8 codes of sums of products, int64 with channels last."""
    codes = multiplied(sums, *output_multipliers(layer)) + codes_of(layer.makes).zero
    made = np.clip(codes, *bounds_in_codes(layer.makes, layer.bounds)).astype(np.int8)
    return made.reshape(layer.makes.shape)


def computed(layer: Convolution, codes: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    read, made = layer.reads[0], layer.makes
    rows, columns, channels = made.image
    seen = windows_of(
        codes.reshape(read.image), layer.windows, (rows, columns), codes_of(read).zero
    )
    weights = layer.weights.reshape(channels, -1)
    # Products of bytes add up exactly in float64, which BLAS is fast with.
    sums = seen.reshape(rows * columns, -1).astype(np.float64) @ weights.T.astype(np.float64)
    return rescaled(layer, sums.astype(np.int64) + shifted_bias(layer, weights))
