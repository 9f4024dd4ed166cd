"""Causal attention of many queries, with a running softmax."""

from __future__ import annotations

from typing import Any

from headrace.kernels.kv_cache import CHUNK, padded
from headrace.kernels.math import exp, exp_down
from headrace.kernels.softmax import (
    FLOOR,
    add_to_row,
    begin_row,
    finish_row,
    first_seen,
    mask,
    soften,
)
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bcast_f32,
    bcast_i32,
    bf16_dot,
    bf16_pairs,
    evens,
    fma_outer,
    get_f32,
    get_i64,
    larger,
    load_f16,
    load_f32,
    load_f32_grid,
    load_i32,
    max_f32,
    maximum,
    odds,
    repeat,
    smaller,
    splat_f32,
    store_f32,
    store_f32_grid,
    store_i32,
    sum_f32,
    zeros_f32,
)
from headrace.targets.table import KernelFunction
from headrace.targets.target import Target

QUERIES = 16  # queries that share a pass over the keys


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


def prefill(d16: int, target: Target) -> KernelFunction:
    """Causal attention of a chunk of queries, 16 at a time, with a running softmax.

    Slots as in decode; 20 out [token][heads * head width], 27 address of the token count, 31
    rotated queries (room for a multiple of 16 tokens), 32 bytes between tokens of out.
    Threads take every n-th (block of queries, head) pair.
    """
    width = d16 * 16
    # 32 registers hold 16 sums of 16 lanes; 16 registers of 8 lanes hold 4.
    wide = target.vector_bytes >= 64
    key_vectors = 4 if wide else 1
    value_vectors = _divisor(d16, 4 if wide else 1)
    step = 16 * key_vectors
    row = CHUNK * 4  # bytes of a row of scores
    many_k = 4 * key_vectors

    def scores_of(q: Any, q_stride: Any, k: Any, t0: Any, t1: Any, scores: Any) -> None:
        for t in range(t0, t1, step):
            acc = repeat(zeros_f32(1), many_k)
            at = k + (t - t0) * (width * 2)
            for d in range(width):
                keys = load_f16(at + d * 32, key_vectors, width * 32)
                acc = fma_outer(keys, bcast_f32(q + d * 4, 4, q_stride), acc)
            store_f32_grid(scores + (t - t0) * 4, acc, 4, 64, row)

    def values_of(v: Any, t0: Any, low: Any, t1: Any, scores: Any, out: Any) -> None:
        for d in range(0, width, 16 * value_vectors):
            acc = load_f32_grid(out + d * 4, value_vectors, 4, 64, width * 4)
            for t in range(low, t1):
                values = load_f16(v + ((t - t0) * (width * 2) + d * 2), value_vectors, 32)
                acc = fma_outer(values, bcast_f32(scores + (t - t0) * 4, 4, row), acc)
            store_f32_grid(out + d * 4, acc, 4, 64, width * 4)

    def softmax(scores: Any, t0: Any, t1: Any, end: Any, low: Any, cap: Any, state: Any,
                out: Any) -> None:  # fmt: skip
        # state: running maximum and sum of this query; end: its own position + 1
        most = splat_f32(FLOOR)
        for t in range(t0, t1, 16):
            s = mask(soften(load_f32(scores + (t - t0) * 4, 1, 0), cap), t, low, end)
            store_f32(scores + (t - t0) * 4, s, 0)
            most = maximum(most, s)
        m = larger(get_f32(state), max_f32(most))
        top = splat_f32(m)
        total = zeros_f32(1)
        for t in range(t0, t1, 16):
            p = exp(load_f32(scores + (t - t0) * 4, 1, 0) - top)
            store_f32(scores + (t - t0) * 4, p, 0)
            total = total + p
        add_to_row(state, out, width, m, sum_f32(total))

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        n_heads = arg_int(args, 7)
        n_kv = arg_int(args, 8)
        head = arg_int(args, 9)
        cap = arg_float(args, 18)
        window = arg_int(args, 19)
        position = get_i64(arg_ptr(args, 25))
        count = get_i64(arg_ptr(args, 27))
        rotated = arg_ptr(args, 31)
        out_stride = arg_int(args, 32)
        scores = arg_ptr(args, 21) + arg_int(args, 22) * thread
        sums = scores + QUERIES * row
        state = sums + QUERIES * width * 4
        group = n_heads // n_kv
        q_stride = n_heads * width * 4
        n_blocks = (count + QUERIES - 1) // QUERIES
        for u in range(thread, n_blocks * n_heads, n_threads):
            block = n_blocks - 1 - u // n_heads  # the longest first
            h = u % n_heads
            kc = arg_ptr(args, 3) + (h // group) * arg_int(args, 5)
            vc = arg_ptr(args, 4) + (h // group) * arg_int(args, 6)
            first = block * QUERIES
            n_queries = smaller(QUERIES, count - first)
            q = rotated + (first * n_heads + h) * (width * 4)
            start = position + first
            low = first_seen(start, window)
            end = start + n_queries
            for i in range(QUERIES):
                begin_row(state + i * 8, sums + i * width * 4, width)
            for t0 in range((low // CHUNK) * CHUNK, end, CHUNK):
                t1 = smaller(t0 + CHUNK, end)
                kt = kc + t0 // CHUNK * arg_int(args, 33)
                vt = vc + t0 // CHUNK * arg_int(args, 34)
                for i in range(0, n_queries, 4):
                    scores_of(q + i * q_stride, q_stride, kt, t0, t1, scores + i * row)
                for i in range((n_queries + 3) // 4 * 4):
                    own_low = first_seen(start + i, window)
                    softmax(scores + i * row, t0, t1, start + i + 1, own_low, cap, state + i * 8,
                            sums + i * width * 4)  # fmt: skip
                for i in range(0, n_queries, 4):
                    values_of(vt, t0, larger(t0, low), smaller(t1, start + i + 4), scores + i * row,
                              sums + i * width * 4)  # fmt: skip
            for i in range(n_queries):
                to = arg_ptr(args, 20) + ((first + i) * out_stride + h * head * 4)
                finish_row(sums + i * width * 4, get_f32(state + (i * 8 + 4)), to, head)

    return kernel


def prefill_bf16(d16: int) -> KernelFunction:
    """As `prefill`, with products of bfloat16 pairs; threads take (block of queries, KV head).

    Keys and values of a chunk are converted once for all queries of the block that share them.
    """
    width = d16 * 16
    row = CHUNK * 4
    value_vectors = _divisor(d16, 4)

    def convert_keys(k: Any, n: Any, out: Any) -> None:
        # to [block of 16 tokens][pair of d][16 tokens]
        for t in range(0, n, 16):
            at = k + t * (width * 2)
            to = out + t * (width * 2)
            for d in range(0, width, 2):
                pairs = bf16_pairs(load_f16(at + d * 32, 1, 0), load_f16(at + (d + 1) * 32, 1, 0))
                store_i32(to + d * 32, pairs, 0)

    def convert_values(v: Any, n: Any, out: Any) -> None:
        # to [pair of tokens][d]
        for t in range(0, n, 2):
            at = v + t * (width * 2)
            to = out + t * (width * 2)
            for d in range(0, width, 16):
                pairs = bf16_pairs(load_f16(at + d * 2, 1, 0), load_f16(at + (width + d) * 2, 1, 0))
                store_i32(to + d * 4, pairs, 0)

    def convert_row(src: Any, n: Any, out: Any) -> None:
        for i in range(0, n, 32):
            a = load_f32(src + i * 4, 1, 0)
            b = load_f32(src + (i * 4 + 64), 1, 0)
            store_i32(out + i * 2, bf16_pairs(evens(a, b), odds(a, b)), 0)

    def scores_of(q: Any, keys: Any, n: Any, scores: Any) -> None:
        for t in range(0, n, 64):
            acc = repeat(zeros_f32(1), 16)
            at = keys + t * (width * 2)
            for d in range(0, width, 2):
                k = load_i32(at + d * 32, 4, width * 32)
                acc = bf16_dot(acc, k, bcast_i32(q + d * 2, 4, width * 2))
            store_f32_grid(scores + t * 4, acc, 4, 64, row)

    def values_of(values: Any, first: Any, last: Any, p: Any, out: Any) -> None:
        for d in range(0, width, 16 * value_vectors):
            acc = load_f32_grid(out + d * 4, value_vectors, 4, 64, width * 4)
            for t in range(first, last, 2):
                v = load_i32(values + (t * (width * 2) + d * 4), value_vectors, 64)
                acc = bf16_dot(acc, v, bcast_i32(p + t * 2, 4, CHUNK * 2))
            store_f32_grid(out + d * 4, acc, 4, 64, width * 4)

    def softmax(scores: Any, p: Any, t0: Any, t1: Any, end: Any, low: Any, cap: Any, state: Any,
                out: Any) -> None:  # fmt: skip
        most = splat_f32(FLOOR)
        # Masks cost as much as the rest of this loop: only at the edges of what is visible.
        plain = larger(t0, smaller(t1, end // 16 * 16))
        first = smaller(plain, t0 + (larger(0, low - t0) + 15) // 16 * 16)
        for t in range(t0, t1, 16):
            s = soften(load_f32(scores + (t - t0) * 4, 1, 0), cap)
            if t < first or t >= plain:
                s = mask(s, t, low, end)
                store_f32(scores + (t - t0) * 4, s, 0)
            elif cap > 0.0:
                store_f32(scores + (t - t0) * 4, s, 0)
            most = maximum(most, s)
        m = larger(get_f32(state), max_f32(most))
        top = splat_f32(m)
        total = zeros_f32(1)
        for t in range(t0, t1, 32):
            a = exp_down(load_f32(scores + (t - t0) * 4, 1, 0) - top)
            b = exp_down(load_f32(scores + ((t - t0) * 4 + 64), 1, 0) - top)
            store_i32(p + (t - t0) * 2, bf16_pairs(evens(a, b), odds(a, b)), 0)
            total = total + a + b
        add_to_row(state, out, width, m, sum_f32(total))

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        n_heads = arg_int(args, 7)
        n_kv = arg_int(args, 8)
        head = arg_int(args, 9)
        cap = arg_float(args, 18)
        window = arg_int(args, 19)
        position = get_i64(arg_ptr(args, 25))
        count = get_i64(arg_ptr(args, 27))
        rotated = arg_ptr(args, 31)
        out_stride = arg_int(args, 32)
        group = n_heads // n_kv
        queries = smaller(64, larger(1, 64 // (group * 16)) * 16)
        rows = queries * group
        keys = arg_ptr(args, 21) + arg_int(args, 22) * thread
        values = keys + CHUNK * width * 2
        scores = values + CHUNK * width * 2
        weights = scores + rows * row
        sums = weights + rows * (CHUNK * 2)
        coded = sums + rows * (width * 4)
        state = coded + rows * (width * 2)
        n_blocks = (count + queries - 1) // queries
        for u in range(thread, n_blocks * n_kv, n_threads):
            block = n_blocks - 1 - u // n_kv  # the longest first
            kv = u % n_kv
            kc = arg_ptr(args, 3) + kv * arg_int(args, 5)
            vc = arg_ptr(args, 4) + kv * arg_int(args, 6)
            first = block * queries
            n_queries = smaller(queries, count - first)
            whole = (n_queries + 3) // 4 * 4
            start = position + first
            low = first_seen(start, window)
            end = start + n_queries
            for g in range(group):
                for i in range(n_queries):
                    at = (first + i) * n_heads + kv * group + g
                    convert_row(rotated + at * (width * 4), width,
                                coded + (g * queries + i) * (width * 2))  # fmt: skip
            for i in range(rows):
                begin_row(state + i * 8, sums + i * width * 4, width)
            for t0 in range((low // CHUNK) * CHUNK, end, CHUNK):
                t1 = smaller(t0 + CHUNK, end)
                n = (t1 - t0 + 63) // 64 * 64
                skip = larger(0, low - t0) // 32 * 32  # nothing before is visible to any query
                convert_keys(kc + t0 // CHUNK * arg_int(args, 33), n, keys)
                convert_values(vc + t0 // CHUNK * arg_int(args, 34), n, values)
                for g in range(group):
                    for i in range(0, whole, 4):
                        r = g * queries + i
                        # What lies beyond the last query's own position need not be computed.
                        some = smaller(n, (start + i + 4 - t0 + 63) // 64 * 64)
                        scores_of(coded + r * (width * 2), keys, some, scores + r * row)
                        many = (smaller(t1, start + i + 4) - t0 + 31) // 32 * 32
                        for j in range(i, i + 4):
                            own = g * queries + j
                            own_low = first_seen(start + j, window)
                            softmax(scores + own * row, weights + own * (CHUNK * 2), t0, t0 + many,
                                    start + j + 1, own_low, cap, state + own * 8,
                                    sums + own * (width * 4))  # fmt: skip
                        values_of(values, skip, many, weights + r * (CHUNK * 2),
                                  sums + r * (width * 4))  # fmt: skip
            for g in range(group):
                for i in range(n_queries):
                    r = g * queries + i
                    h = kv * group + g
                    to = arg_ptr(args, 20) + ((first + i) * out_stride + h * head * 4)
                    finish_row(sums + r * width * 4, get_f32(state + (r * 8 + 4)), to, head)

    return kernel


def prefill_scratch_bytes(head: int, group: int) -> int:
    """Scratch that each thread needs in prefill when `group` heads share a KV head."""
    width = padded(head)
    rope = 16 * width * 4
    plain = QUERIES * (CHUNK + width + 2) * 4
    rows = min(64, max(1, 64 // (group * 16)) * 16) * group
    pairs = 4 * CHUNK * width + rows * (CHUNK * 6 + width * 6 + 8)
    return max(rope, plain, pairs) + 64
