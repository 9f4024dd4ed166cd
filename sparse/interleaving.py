"""Scalar pieces of the formats' tiling kernels (the native twin of `format.interleave`)."""

from __future__ import annotations

from typing import Any

from headrace.targets.simd import get_u8, get_u32, put_u8, put_u32


def interleave_words(src: Any, row_bytes: Any, dst: Any, n_words: Any) -> None:
    """Runs of 4 bytes of 16 rows side by side, `n_words` times."""
    for row in range(16):
        for k in range(n_words):
            put_u32(dst + (k * 64 + row * 4), get_u32(src + (row * row_bytes + k * 4)))


def interleave_halves(src: Any, row_bytes: Any, dst: Any) -> None:
    """One float16 of each of 16 rows side by side."""
    for row in range(16):
        put_u8(dst + row * 2, get_u8(src + row * row_bytes))
        put_u8(dst + (row * 2 + 1), get_u8(src + (row * row_bytes + 1)))
