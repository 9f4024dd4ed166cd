"""Convolutions of each channel for itself, of int8 codes.

Source: TensorFlow Lite's `reference_integer_ops::DepthwiseConvPerChannel`.
"""

from __future__ import annotations

import numpy as np

from headrace.micro.int8.codes import codes_of, shifted_bias
from headrace.micro.int8.convolution import rescaled
from headrace.micro.int8.windows import windows_of
from headrace.micro.network import Depthwise


def by_channel(layer: Depthwise) -> np.ndarray:
    """Weights [made, rows * columns]."""
    return layer.weights.reshape(-1, layer.weights.shape[-1]).T


def computed(layer: Depthwise, codes: np.ndarray) -> np.ndarray:
    """int8 codes of what the layer makes."""
    read, made = layer.reads[0], layer.makes
    rows, columns, channels = made.image
    seen = windows_of(
        codes.reshape(read.image), layer.windows, (rows, columns), codes_of(read).zero
    )
    each = seen.repeat(channels // read.image[2], axis=-1)
    sums = np.einsum("abijc,ijc->abc", each, layer.weights.astype(np.int64))
    return rescaled(layer, sums + shifted_bias(layer, by_channel(layer)))
