"""What kernels of 8-bit images have in common: how sums become bytes again, and their layout.

A quantised value is q = saturate(round(x / scale) + zero), rounded to the nearest and ties to even
as ONNX's QuantizeLinear does, 0..255. Images of int8 are kept with 128 added, their zero points
too. A sum of products of quantised activations and weights w is an exact int32; it becomes a byte:

    y = max(least, min(most, round(float32(sum) * scale[channel]) + zero))

in float32, where scale is read scale * weight scale / written scale, rounded once to float32. Their
product must be in the range of integers.

Pixels have channels padded to 16 bytes; those of at most 4 channels (of a network's input) have 4.
What pads hold is nothing in particular. Up to 63 bytes behind an image may be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

GROUP = 64  # channels in a vector of bytes


@dataclass(frozen=True, slots=True)
class Quantised:
    """How bytes stand for numbers: (q - zero) * scale, q from least to most."""

    scale: float
    zero: int
    least: int = 0
    most: int = 255


def pixel_bytes(channels: int) -> int:
    """Between pixels of an image of bytes."""
    return 4 if channels <= 4 else -(-channels // 16) * 16


def byte_order(vectors: int) -> np.ndarray:
    """Channels of the lanes of 1, 2 or 4 vectors of a pixel, which `to_bytes` makes bytes in order.

    It takes 4 vectors, so those of 4, 2 or 1 pixels (`store_u8_rows`). [vectors, 16].
    """
    import numpy as np

    rows = np.arange(16 * vectors).reshape(4, vectors, 4).transpose(1, 0, 2)
    found: np.ndarray = rows.reshape(vectors, 16)
    return found


def requantised(sums: np.ndarray, scale: np.ndarray, to: Quantised) -> np.ndarray:
    """Reference: int sums [..., channels] as bytes."""
    import numpy as np

    product = sums.astype(np.int32).astype(np.float32) * scale.astype(np.float32)
    whole = np.clip(np.rint(product.astype(np.float64)) + to.zero, to.least, to.most)
    found: np.ndarray = whole.astype(np.uint8)
    return found


def quantised(x: np.ndarray, to: Quantised) -> np.ndarray:
    """Reference: QuantizeLinear."""
    import numpy as np

    whole = np.rint((x.astype(np.float32) / np.float32(to.scale)).astype(np.float64)) + to.zero
    found: np.ndarray = np.clip(whole, to.least, to.most).astype(np.uint8)
    return found


def dequantised(q: np.ndarray, of: Quantised) -> np.ndarray:
    """Reference: DequantizeLinear."""
    import numpy as np

    found: np.ndarray = (q.astype(np.int32) - of.zero).astype(np.float32) * np.float32(of.scale)
    return found


def scales(read: Quantised, weights: np.ndarray, written: float) -> np.ndarray:
    """What sums are multiplied by, for each channel."""
    import numpy as np

    exact = np.float64(np.float32(read.scale)) * weights.astype(np.float32).astype(np.float64)
    found: np.ndarray = (exact / np.float64(np.float32(written))).astype(np.float32)
    return found


def folded_bias(bias: np.ndarray, sums: np.ndarray, zero: int) -> np.ndarray:
    """The int32 bias with what zero points of activations add to every sum taken away.

    `sums` are those of the weights of each channel, over all taps. It wraps as int32 does, so that
    sums which fit come out right whatever lies between.
    """
    import numpy as np

    whole = bias.astype(np.int64) - zero * sums.astype(np.int64)
    return (whole & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def rounding_slots(to: Quantised) -> tuple[int, int, int]:
    """What `to_bytes` takes: zero, least and most."""
    return to.zero, to.least, to.most


def check_scale(scale: float) -> bool:
    """Whether it can be divided by."""
    return math.isfinite(scale) and scale > 0
