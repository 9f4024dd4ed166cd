"""The KV cache's layout: what a key, a value and a rotated head look like in it.

The cache is cut in chunks of 256 tokens, each of which holds all layers, so that a conversation
takes memory for what it uses. In a chunk, of one layer and KV head, for D = head width padded to a
multiple of 16:
    K: [block of 16 tokens][D][16 tokens] float16, so that scores of 16 tokens are one vector
    V: [token][D] float16

Rotated heads are kept in half-split (NEOX) order whatever the file's pairing is: queries and keys
are permuted alike, so scores do not change.
"""

from __future__ import annotations

from typing import Any

from headrace.targets.simd import (
    evens,
    get_f32,
    int_to_ptr,
    load_f32,
    odds,
    put_f16,
    put_f32,
    splat_f32,
    sqrt,
    store_f16,
    store_f32,
)

CHUNK = 256


def padded(head: int) -> int:
    """Width of a head in the cache and in the kernels' scratch."""
    return -(-head // 16) * 16


def rotate_head(
    src: Any, dst: Any, head: Any, n_rot: Any, table: Any, paired: Any, norm: Any, eps: Any,
    scale: Any,
) -> None:  # fmt: skip
    """dst = scale * rope(norm(src)) for one head; RMS norm when the address `norm` is not 0.

    `table` has n_rot / 2 cosines, then as many sines, for this position (RoFormer, 2104.09864).
    """
    inverse = 1.0
    if norm != 0:
        total = 0.0
        for i in range(head):
            v = get_f32(src + i * 4)
            total += v * v
        inverse = 1.0 / sqrt(total / head + eps)
    half = n_rot // 2
    if half % 16 == 0:
        unit = splat_f32(inverse)
        factor = splat_f32(scale)
        for i in range(0, half, 16):
            if paired != 0:
                a = load_f32(src + i * 8, 1, 0)
                b = load_f32(src + (i * 8 + 64), 1, 0)
                x = evens(a, b)
                y = odds(a, b)
            else:
                x = load_f32(src + i * 4, 1, 0)
                y = load_f32(src + (half + i) * 4, 1, 0)
            if norm != 0:
                if paired != 0:
                    a = load_f32(int_to_ptr(norm) + i * 8, 1, 0)
                    b = load_f32(int_to_ptr(norm) + (i * 8 + 64), 1, 0)
                    x = x * unit * evens(a, b)
                    y = y * unit * odds(a, b)
                else:
                    x = x * unit * load_f32(int_to_ptr(norm) + i * 4, 1, 0)
                    y = y * unit * load_f32(int_to_ptr(norm) + (half + i) * 4, 1, 0)
            c = load_f32(table + i * 4, 1, 0)
            s = load_f32(table + (half + i) * 4, 1, 0)
            store_f32(dst + i * 4, (x * c - y * s) * factor, 0)
            store_f32(dst + (half + i) * 4, (y * c + x * s) * factor, 0)
    else:
        for i in range(half):
            ix = i
            iy = half + i
            if paired != 0:
                ix = 2 * i
                iy = 2 * i + 1
            x1 = get_f32(src + ix * 4) * inverse
            y1 = get_f32(src + iy * 4) * inverse
            if norm != 0:
                x1 = x1 * get_f32(int_to_ptr(norm) + ix * 4)
                y1 = y1 * get_f32(int_to_ptr(norm) + iy * 4)
            c1 = get_f32(table + i * 4)
            s1 = get_f32(table + (half + i) * 4)
            put_f32(dst + i * 4, (x1 * c1 - y1 * s1) * scale)
            put_f32(dst + (half + i) * 4, (y1 * c1 + x1 * s1) * scale)
    for i in range(n_rot, head):
        v = get_f32(src + i * 4) * inverse
        if norm != 0:
            v = v * get_f32(int_to_ptr(norm) + i * 4)
        put_f32(dst + i * 4, v * scale)


def store_key(key: Any, head: Any, width: Any, k_cache: Any, t: Any) -> None:
    """Write a rotated key as token t of one head's chunk."""
    at = k_cache + ((t // 16) * (width * 32) + (t % 16) * 2)
    for d in range(head):
        put_f16(at + d * 32, get_f32(key + d * 4))


def store_value(value: Any, head: Any, width: Any, v_cache: Any, t: Any) -> None:
    """Write a value as token t of one head's chunk."""
    to = v_cache + t * (width * 2)
    if head % 16 == 0:
        for d in range(0, head, 16):
            store_f16(to + d * 2, load_f32(value + d * 4, 1, 0), 0)
    else:
        for d in range(head):
            put_f16(to + d * 2, get_f32(value + d * 4))
