"""Scales of the MX formats: E8M0, a byte e that stands for a power of two.

The OCP standard calls 255 NaN; GGML, and so this, does not. What is read is half of the scale,
2^(e - 128), so that codes may stand for doubled numbers; it is a subnormal number for e < 2, which
products (`load_e8m0`) take for 0.
Source: `ggml_e8m0_to_fp32_half` of ggml-impl.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.sparse.format import Bytes, Floats
from headrace.targets.simd import (
    bits_f32,
    get_u8,
    lane0,
    select_lt,
    shl,
    splat_i32,
)


def half_scales(e: Bytes) -> Floats:
    """Float32 2^(e - 128) of bytes."""
    code = e.astype(np.uint32)
    bits = np.where(code < 2, (code + 1) << 21, (code - 1) << 23)
    return np.ascontiguousarray(bits.astype(np.uint32)).view(np.float32)


def _from_codes(e: Any) -> Any:
    """In kernels: the larger of what `half_scales` chooses from."""
    small, normal = shl(e + splat_i32(1), 21), shl(e - splat_i32(1), 23)
    return bits_f32(select_lt(small, normal, normal, small))


def get_half_scale(w: Any) -> Any:
    """In kernels: the float32 of one byte."""
    return lane0(_from_codes(splat_i32(get_u8(w))))
