"""I2_S: ternary weights of bitnet.cpp, with a float32 scale for all of a matrix. 2 bits.

A weight is `scale * (code - 1)`, codes 0..2. They load as TQ2_0, whose scales are float16.
Source: `quantize_i2_s` of bitnet.cpp's ggml-bitnet-mad.cpp, as its x86 builds have written files
since the first; builds for ARM, and later ones for x86 with another setting, write other orders
under the same number, which nothing in a file tells.

Row block, 32 bytes for 128 weights (raw):
    bytes      what
    b          bits 6-2k .. 7-2k = code of input 32k + b, k = 0..3
"""

from __future__ import annotations

import numpy as np

from headrace.errors import UnsupportedError
from headrace.sparse import tq2_0
from headrace.sparse.format import Bytes, Floats, Format, as_rows, half_bytes

NAME = "I2_S"
BECOMES = "tq2_0"
BLOCK, BLOCK_BYTES = 128, 32
_SHIFTS = np.array([6, 4, 2, 0], np.uint8)


def codes_of(raw: Bytes) -> Bytes:
    """The codes, in the order of the inputs: uint8 [rows, n / 4] -> [rows, n].

    Raises:
        UnsupportedError: one of them is 3.
    """
    packed = np.ascontiguousarray(raw).reshape(len(raw), -1, 1, BLOCK_BYTES)
    codes: Bytes = (packed >> _SHIFTS[:, None] & 3).reshape(len(raw), -1)
    if (codes == 3).any():
        raise UnsupportedError(
            "it has codes that I2_S does not use: corrupt, or another type of the same number 36 "
            "(IQ4_NL_4_4); get the file as TQ2_0 or IQ4_NL"
        )
    return codes


def expand(raw: Bytes, target: Format, scales: Floats) -> Bytes:
    """Recode rows whose scales are float32 [rows, 1]; to TQ2_0 codes stay what they are.

    Raises:
        UnsupportedError: a code is none.
    """
    codes = codes_of(raw)
    if target.name != BECOMES:
        return target.encode((codes.astype(np.float32) - 1) * scales)
    blocks = codes.reshape(len(raw), -1, tq2_0.BLOCK)
    d = half_bytes(np.broadcast_to(scales[:, None], (*blocks.shape[:2], 1)))
    return as_rows(tq2_0.join(blocks, d))
