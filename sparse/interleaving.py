"""Pieces of the formats' kernels: tiling (the native twin of `format.interleave`), weights."""

from __future__ import annotations

from typing import Any

from headrace.targets.simd import copy_runs, eights, get_u8, get_u16, load_u8, put_u8, put_u16


def interleave_words(src: Any, row_bytes: Any, dst: Any, n_words: Any) -> None:
    """Runs of 4 bytes of 16 rows side by side, `n_words` times (a multiple of 4)."""
    for k in range(n_words // 4):
        copy_runs(dst + k * 256, src + k * 16, row_bytes, 4)


def interleave_halves(src: Any, row_bytes: Any, dst: Any) -> None:
    """One float16 of each of 16 rows side by side."""
    for row in range(16):
        put_u16(dst + row * 2, get_u16(src + row * row_bytes))


def interleave_bytes(src: Any, row_bytes: Any, dst: Any) -> None:
    """One byte of each of 16 rows side by side."""
    for row in range(16):
        put_u8(dst + row, get_u8(src + row * row_bytes))


def load_eights(w: Any, tiles: Any, stride: Any) -> Any:
    """The 128 bytes at `w` of each tile, as `dot8` takes them."""
    return eights(load_u8(w, tiles, stride), load_u8(w + 64, tiles, stride))
