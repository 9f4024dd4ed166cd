"""FP8 weights of checkpoints: E4M3 (no infinities, one NaN) and E5M2, one byte each.

Micikevicius et al., "FP8 Formats for Deep Learning", 2209.05433. Both are exact in float16: E5M2 is
its upper byte, and E4M3 has fewer bits of exponent and of fraction.

    E4M3: sign, 4 bits of exponent (bias 7), 3 of fraction; 0x7F and 0xFF are NaN; up to 448
    E5M2: sign, 5 bits of exponent (bias 15), 2 of fraction; as float16; up to 57344
"""

from __future__ import annotations

import numpy as np

from headrace.sparse.format import Bytes, Floats

NAMES = ("F8_E4M3", "F8_E5M2")


def to_halves(raw: Bytes, name: str) -> Bytes:
    """The same numbers in the bytes of float16: uint8 [rows, n] -> uint8 [rows, 2 * n]."""
    wide = np.ascontiguousarray(raw).astype(np.uint16)
    if name == "F8_E5M2":
        return (wide << 8).view(np.uint8)
    # The fields in float16's places; biases differ by 8.
    halves = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(np.float16) * np.float16(256)
    halves[wide & 0x7F == 0x7F] = np.nan
    return halves.view(np.uint8)


def decode(raw: Bytes, name: str) -> Floats:
    """Give the float32 weights: uint8 [rows, n] -> float32 [rows, n]."""
    return to_halves(raw, name).view(np.float16).astype(np.float32)
