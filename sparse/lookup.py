"""The signed values that 4-bit codes choose from, for the formats whose codes are no integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.format import Bytes, Floats
from headrace.targets.simd import table_words

# E2M1 (a sign, two bits of exponent, one of mantissa), doubled: `kvalues_mxfp4` of ggml-common.h.
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
# Denser where weights are: `kvalues_iq4nl` of ggml-common.h.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
E2M1_LOW, E2M1_HIGH = table_words(E2M1.tolist())
IQ4_LOW, IQ4_HIGH = table_words(IQ4.tolist())


def nearest_e2m1(x: Floats, d: Floats) -> Bytes:
    """Codes of the values whose product with `d` is next to x; the first of equally near ones.

    Source: `best_index_mxfp4` of ggml-quants.c.
    """
    best = np.full(np.broadcast_shapes(x.shape, d.shape), np.float32(np.inf))
    codes = np.zeros(best.shape, np.uint8)
    for code, value in enumerate(E2M1):
        error = np.abs(np.float32(value) * d - x)
        better = error < best
        best, codes = np.where(better, error, best), np.where(better, np.uint8(code), codes)
    return codes


def nearest_iq4(x: Floats) -> Bytes:
    """Codes of the values next to x; the upper of two that are equally near.

    Source: `best_index_int8` of ggml-quants.c.
    """
    values = IQ4.astype(np.float32)
    upper = np.searchsorted(values, x, side="right").clip(1, 15)
    nearer = x - values[upper - 1] < values[upper] - x
    return np.where(nearer, upper - 1, upper).astype(np.uint8)


def search_iq4(x: Floats, tries: int = 0) -> tuple[Floats, Bytes]:
    """Scales [n] and codes [n, k] of sub-blocks x [n, k], without importances.

    The largest magnitude meets the first value. With `tries` it is the last of the other sign
    which does, and so many scales above and below are tried; the codes are then those of the first.
    Source: `quantize_row_iq4_nl_impl` of ggml-quants.c.
    """
    x = np.ascontiguousarray(x.T)  # sums run in C's order
    at = np.abs(x).argmax(axis=0, keepdims=True)
    most = np.take_along_axis(x, at, axis=0)[0]
    zero = np.abs(most) < np.float32(1e-15)
    values, weight = IQ4.astype(np.float32), x * x

    def sums(inverse: Floats) -> tuple[Floats, Floats, Bytes]:
        codes = nearest_iq4(inverse * x)
        q = values[codes]
        return (weight * q * x).sum(axis=0), (weight * q * q).sum(axis=0), codes

    first = (-most if tries else most) / values[0]
    sum_qx, sum_q2, codes = sums(1 / first)
    d = sum_qx / sum_q2
    best = d * sum_qx
    for step in range(-tries, tries + 1) if tries else ():
        sum_qx, sum_q2, _ = sums((np.float32(step) + values[0]) / most)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        d = np.where(better, sum_qx / sum_q2, d)
        best = np.where(better, d * sum_qx, best)
    return np.where(zero, np.float32(0), d), np.where(zero, np.uint8(0), codes).T


def table_value(low: Any, high: Any, code: Any) -> Any:
    """In kernels: the value that code 0..15 chooses, as an integer."""
    byte = ((low if code < 8 else high) >> (code % 8 * 8)) & 255
    return (byte ^ 128) - 128
