"""FP4 weights that have a scale for all of a matrix: GGUF's NVFP4 with one, and packed checkpoints.

NVFP4: as `headrace.sparse.nvfp4` has it
F4_E2M1: byte b = code of input 2b (low nibble) | code of input 2b + 1 (high nibble)
"""

from __future__ import annotations

import numpy as np

from headrace.sparse import nvfp4
from headrace.sparse.format import Bytes, Floats, Format, byte_blocks, unpack_nibbles
from headrace.sparse.fp4 import pack
from headrace.sparse.lookup import E2M1

PACKED = "F4_E2M1"
NAMES = (PACKED, "NVFP4")
SCALED = "e2m1_g16"  # our format of such matrices
GROUP = 16


def expand(raw: Bytes, name: str, target: Format, scales: Floats) -> Bytes:
    """Recode rows: their codes as they are, where `target` is the format of `SCALED`.

    Args:
        scales: float32, of `PACKED` [rows, n / 16], of "NVFP4" [rows, 1] times those it has itself.
    """
    if name == PACKED:
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
        half = scales * np.float32(0.5)
    else:
        blocks = byte_blocks(raw, nvfp4.BLOCK_BYTES)
        packed = blocks[..., 4:].reshape(*blocks.shape[:2], 4, 8)
        codes = unpack_nibbles(packed).reshape(len(raw), -1)
        half = nvfp4.half_scales(blocks[..., :4]).reshape(len(raw), -1) * scales
    if target.name == SCALED:
        return pack(codes, half, GROUP)
    return target.encode(E2M1[codes].astype(np.float32) * np.repeat(half, GROUP, axis=1))
