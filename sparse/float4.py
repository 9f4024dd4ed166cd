"""FP4 weights with scales of their own tensor: GGUF's NVFP4 with one, and packed checkpoints.

NVFP4: as `headrace.sparse.nvfp4` has it
F4_E2M1: byte b = code of input 2b (low nibble) | code of input 2b + 1 (high nibble); scales of 16
inputs (NVFP4), or powers of two for 32 (MXFP4)
"""

from __future__ import annotations

import numpy as np

from headrace.sparse import mxfp4, nvfp4
from headrace.sparse.format import (
    Bytes,
    Floats,
    Format,
    as_rows,
    byte_blocks,
    pack_nibbles,
    unpack_nibbles,
)
from headrace.sparse.fp4 import pack
from headrace.sparse.lookup import E2M1

PACKED = "F4_E2M1"
NAMES = (PACKED, "NVFP4")
GROUP = 16


def becomes(name: str, columns: int) -> str:
    """The format of such matrices, a scale being for so many columns."""
    return "mxfp4" if name == PACKED and columns == mxfp4.BLOCK else "e2m1_g16"


def expand(raw: Bytes, name: str, target: Format, scales: Floats, columns: int) -> Bytes:
    """Recode rows: their codes as they are, where `target` is the format that they become.

    Args:
        scales: float32, of `PACKED` [rows, n / columns], of "NVFP4" [rows, 1] times those it has
            itself.
        columns: weights that share a scale of `PACKED`.
    """
    if name == PACKED:
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
        group, half = columns, scales * np.float32(0.5)
    else:
        blocks = byte_blocks(raw, nvfp4.BLOCK_BYTES)
        packed = blocks[..., 4:].reshape(*blocks.shape[:2], 4, 8)
        codes = unpack_nibbles(packed).reshape(len(raw), -1)
        group, half = GROUP, nvfp4.half_scales(blocks[..., :4]).reshape(len(raw), -1) * scales
    if target.name != becomes(name, columns):
        return target.encode(E2M1[codes].astype(np.float32) * np.repeat(half, group, axis=1))
    if target.name == "mxfp4":
        by_block = pack_nibbles(codes.reshape(*scales.shape, group))
        return as_rows(np.concatenate([_exponents(scales)[..., None], by_block], axis=-1))
    return pack(codes, half, GROUP)


def _exponents(scales: Floats) -> Bytes:
    """The E8M0 bytes of powers of two; of 2^128, which float32 has not, 255."""
    found: Bytes = np.where(np.isinf(scales), 255, np.frexp(scales)[1] + 126).astype(np.uint8)
    return found
