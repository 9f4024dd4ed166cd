"""Rotary embedding of a chunk of tokens, which also stores its keys and values."""

from __future__ import annotations

from typing import Any

from headrace.kernels.kv_cache import CHUNK, rotate_head, store_key, store_value
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    get_i64,
    larger,
    load_f32,
    put_f32,
    smaller,
    store_f16,
    transpose16,
)
from headrace.targets.table import KernelFunction


def rope(d16: int) -> KernelFunction:
    """Rotate the queries of a chunk of tokens, rotate and store their keys, store their values.

    Slots 0..16 and 25 as in decode (17: scale, put on the queries); 27 address of the token count,
    28..30 bytes between tokens of q, k, v; 31 rotated queries [token][head][D] float32;
    21, 22 scratch of 16 * D floats. Threads share the blocks of 16 positions.
    """
    width = d16 * 16

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        q = arg_ptr(args, 0)
        k = arg_ptr(args, 1)
        v = arg_ptr(args, 2)
        k_stride = arg_int(args, 5)
        v_stride = arg_int(args, 6)
        n_heads = arg_int(args, 7)
        n_kv = arg_int(args, 8)
        head = arg_int(args, 9)
        n_rot = arg_int(args, 10)
        paired = arg_int(args, 13)
        eps = arg_float(args, 16)
        scale = arg_float(args, 17)
        position = get_i64(arg_ptr(args, 25))
        end = position + get_i64(arg_ptr(args, 27))
        keys = arg_ptr(args, 21) + arg_int(args, 22) * thread
        rotated = arg_ptr(args, 31)
        table = arg_ptr(args, 11)
        table_row = arg_int(args, 12)
        k_chunk = arg_int(args, 33)
        v_chunk = arg_int(args, 34)
        k_token = arg_int(args, 29)
        v_token = arg_int(args, 30)
        first_block = position // 16
        n_blocks = (end + 15) // 16 - first_block
        for i in range(16):
            for d in range(head, width):
                put_f32(keys + (i * width + d) * 4, 0.0)
        for block in range(
            first_block + n_blocks * thread // n_threads,
            first_block + n_blocks * (thread + 1) // n_threads,
        ):
            t0 = larger(position, block * 16)
            t1 = smaller(end, block * 16 + 16)
            for t in range(t0, t1):
                for h in range(n_heads):
                    to = rotated + ((t - position) * n_heads + h) * (width * 4)
                    at = q + ((t - position) * arg_int(args, 28) + h * head * 4)
                    rotate_head(at, to, head, n_rot, table + t * table_row, paired,
                                arg_int(args, 14), eps, scale)  # fmt: skip
                    for d in range(head, width):
                        put_f32(to + d * 4, 0.0)
            for h in range(n_kv):
                k_cache = arg_ptr(args, 3) + (t0 // CHUNK * k_chunk + h * k_stride)
                v_cache = arg_ptr(args, 4) + (t0 // CHUNK * v_chunk + h * v_stride)
                for t in range(t0, t1):
                    key = keys + (t % 16) * (width * 4)
                    at = (t - position) * k_token + h * head * 4
                    rotate_head(k + at, key, head, n_rot, table + t * table_row, paired,
                                arg_int(args, 15), eps, 1.0)  # fmt: skip
                    value = v + ((t - position) * v_token + h * head * 4)
                    store_value(value, head, width, v_cache, t % CHUNK)
                    if t1 - t0 < 16:
                        store_key(key, head, width, k_cache, t % CHUNK)
                if t1 - t0 == 16:
                    for d in range(0, width, 16):
                        tokens = load_f32(keys + d * 4, 16, width * 4)
                        to = k_cache + (block * 16 % CHUNK * (width * 2) + d * 32)
                        store_f16(to, transpose16(tokens), 32)

    return kernel
