"""Attention of a few tokens over the cache: bit for bit what `attention_decode` gives for each.

`rope` has rotated the queries and stored keys and values. A unit of work is a token's head, over
all chunks of the cache: a few tokens are units enough, and none waits for another.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.attention_decode import attend_chunk, combine_chunks
from headrace.kernels.kv_cache import CHUNK
from headrace.kernels.softmax import finish_row, first_seen
from headrace.targets.simd import arg_int, arg_ptr, get_f32, get_i64
from headrace.targets.table import KernelFunction


def short(d16: int) -> KernelFunction:
    """A few tokens against the cache, which has their keys and values.

    Slots as in decode and rope; 23 partial results with room for the chunks of one head for every
    thread, 32 bytes between tokens of out. Threads share the (head, token) pairs.
    """
    width = d16 * 16
    chunk = attend_chunk(d16)
    combine = combine_chunks(d16)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        n_heads = arg_int(args, 7)
        n_kv = arg_int(args, 8)
        head = arg_int(args, 9)
        window = arg_int(args, 19)
        out = arg_ptr(args, 20)
        scores = arg_ptr(args, 21) + arg_int(args, 22) * thread
        result = scores + CHUNK * 4
        start = get_i64(arg_ptr(args, 25))
        stride = width * 4 + 64
        parts = arg_ptr(args, 23) + arg_int(args, 26) * stride * thread
        n_tokens = get_i64(arg_ptr(args, 27))
        rotated = arg_ptr(args, 31)
        out_stride = arg_int(args, 32)
        group = n_heads // n_kv
        units = n_heads * n_tokens
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            # Tokens that read the same keys and values come one after the other.
            kv = u // (group * n_tokens)
            token = (u % (group * n_tokens)) // group
            h = kv * group + u % group
            position = start + token
            low = first_seen(position, window)
            first_chunk = low // CHUNK
            n_chunks = position // CHUNK + 1 - first_chunk
            q = rotated + (token * n_heads + h) * (width * 4)
            to = out + (token * out_stride + h * head * 4)
            for c in range(n_chunks):
                chunk(args, q, kv, first_chunk + c, position, low, scores, parts + c * stride)
            if n_chunks == 1:
                finish_row(parts, get_f32(parts + (width * 4 + 4)), to, head)
            else:
                combine(parts, n_chunks, stride, result, to, head)

    return kernel
