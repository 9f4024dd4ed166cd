"""Numpy parts that several K formats share: ggml's search of scales and minimums, 6-bit scales.

Source: `make_qkx2_quants` and `get_scale_min_k4` of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.sparse.format import Bytes, Floats, as_rows, half_bytes, weight_blocks

BLOCK = 256
CHUNK = 2048  # blocks that are searched at once: some 20 MB of temporaries


def encode_blocks(x: Floats, block_bytes: int, encode: Callable[[Floats], Bytes]) -> Bytes:
    """Quantise float32 [rows, n] by `encode`, float32 [k, 256] -> uint8 [k, block_bytes]."""
    blocks = weight_blocks(x, BLOCK)
    flat = blocks.reshape(-1, BLOCK)
    raw = np.empty((len(flat), block_bytes), np.uint8)
    for at in range(0, len(flat), CHUNK):
        raw[at : at + CHUNK] = encode(flat[at : at + CHUNK])
    return as_rows(raw.reshape(*blocks.shape[:2], block_bytes))


def sub_blocks(blocks: Floats, size: int) -> Floats:
    """[n, 256] -> [size, sub-blocks], contiguous: sums over axis 0 run in C's order."""
    return np.ascontiguousarray(blocks.reshape(-1, size).T)


def spread_weights(x: Floats) -> Floats:
    """Weights of the errors: magnitudes [k, n], and the root of each sub-block's mean square."""
    weights: Floats = np.sqrt((x * x).sum(axis=0) / np.float32(len(x))) + np.abs(x)
    return weights


def search_with_minimum(
    x: Floats, weight: Floats, top: int, first: float, steps: int, absolute: bool = False
) -> tuple[Floats, Floats, Floats]:
    """Find the scale and the minimum of sub-blocks with codes 0..top.

    Args:
        x: the weights, float32 [k, n]: n sub-blocks of k.
        weight: what the error of each counts, float32 [k, n].
        top: the largest code.
        first: how many levels more than `top` the first step spreads over the range of a block.
        steps: how many numbers of levels are tried, 0.1 apart.
        absolute: errors count by their magnitude, not by their square.

    Returns:
        scale [n], minus the minimum [n], codes [k, n].
    """

    def error_of(scale: Floats, codes: Floats, low: Floats) -> Floats:
        off = scale * codes + low - x
        error: Floats = (weight * (np.abs(off) if absolute else off**2)).sum(axis=0)
        return error

    sum_w, sum_x = weight.sum(axis=0), (weight * x).sum(axis=0)
    high = x.max(axis=0)
    low = np.minimum(x.min(axis=0), np.float32(0))
    flat = high == low
    scale = 1 / (top / (high - low))
    codes = np.rint(top / (high - low) * (x - low)).clip(0, top)
    error = error_of(scale, codes, low)
    for step in range(steps):
        levels = np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(top)
        # `low` is the best so far, not the block's own: each step starts from the last success.
        tried = np.rint(levels / (high - low) * (x - low)).clip(0, top)
        weighted = weight * tried
        sum_l = weighted.sum(axis=0)
        sum_l2, sum_xl = (weighted * tried).sum(axis=0), (weighted * x).sum(axis=0)
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        new_scale = np.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = np.minimum(new_low, np.float32(0))
        new_error = error_of(new_scale, tried, new_low)
        better = (det > 0) & (new_error < error)
        codes = np.where(better, tried, codes)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
        error = np.where(better, new_error, error)
    # A sub-block of one value <= 0 is all minimum.
    return np.where(flat, 0, scale), -low, np.where(flat, 0, codes)


def six_bits(values: Floats) -> tuple[Bytes, Bytes]:
    """Floats [n, k] -> float16 bytes [n, 2] of their unit, codes 0..63 [n, k]."""
    most = values.max(axis=-1, keepdims=True).clip(0, None)
    inverse = np.where(most > 0, np.float32(63) / most, np.float32(0))
    # A negative scale wraps around to 63, as it does in C.
    codes = np.rint(inverse * values).astype(np.int32).astype(np.uint8)
    return half_bytes(most / np.float32(63)), np.minimum(codes, 63)


def pack_scales(scale: Bytes, low: Bytes) -> Bytes:
    """Pack 8 scales and 8 minimums, [..., 8] and [..., 8] of 0..63, into [..., 12]."""
    first = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    second = low[..., :4] | (low[..., 4:] >> 4 << 6)
    third = (scale[..., 4:] & 0x0F) | (low[..., 4:] << 4)
    return np.concatenate([first, second, third], axis=-1)


def unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Undo `pack_scales`."""
    first, second, third = np.split(packed, 3, axis=-1)
    scale = np.concatenate([first & 63, (third & 0x0F) | (first >> 6 << 4)], axis=-1)
    low = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scale, low
