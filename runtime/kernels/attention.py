"""Attention over a half-precision KV cache: rotary embedding, cache update, softmax, values.

The cache is cut in chunks of 256 tokens, each of which holds all layers, so that a conversation
takes memory for what it uses. In a chunk, of one layer and KV head, for D = head width padded to a
multiple of 16:
    K: [block of 16 tokens][D][16 tokens] float16, so that scores of 16 tokens are one vector
    V: [token][D] float16
Decode gives each chunk its own softmax and combines them in order of
position: the result depends neither on the number of threads nor on who computed which chunk.

Rotated heads are kept in half-split (NEOX) order whatever the file's pairing is: queries and keys
are permuted alike, so scores do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp, exp_down, tanh
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    atomic_add,
    atomic_put,
    bcast_f32,
    bcast_i32,
    bf16_dot,
    bf16_pairs,
    evens,
    fma,
    fma_outer,
    get_f32,
    get_i64,
    int_to_ptr,
    iota_i32,
    lane0,
    larger,
    load_f16,
    load_f32,
    load_f32_grid,
    load_i32,
    max_f32,
    maximum,
    odds,
    put_f16,
    put_f32,
    repeat,
    select_lt,
    smaller,
    splat_f32,
    splat_i32,
    sqrt,
    store_f16,
    store_f32,
    store_f32_grid,
    store_i32,
    sum_f32,
    transpose16,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

CHUNK = 256
QUERIES = 16  # queries that share a pass over the keys in prefill
_MASKED = -1e30
_FLOOR = -1e29  # a row maximum is at least this, so that masked scores vanish in exp


def padded(head: int) -> int:
    """Width of a head in the cache and in the kernels' scratch."""
    return -(-head // 16) * 16


# --- rotary embedding and cache update ------------------------------------------------------------


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


def soften(score: Any, cap: Any) -> Any:
    """cap * tanh(score / cap), or the score where cap is 0 (logit soft-capping of Gemma 2)."""
    if cap > 0.0:
        score = splat_f32(cap) * tanh(score / splat_f32(cap))
    return score


def _mask(score: Any, at: Any, low: Any, high: Any) -> Any:
    position = iota_i32() + splat_i32(at)
    masked = splat_f32(_MASKED)
    score = select_lt(position, splat_i32(high), score, masked)
    return select_lt(position, splat_i32(low), masked, score)


def _exp1(x: Any) -> Any:
    return lane0(exp(splat_f32(x)))


# --- decode: one query ----------------------------------------------------------------------------


def _decode(d16: int) -> KernelFunction:
    """One token against the cache; rotates it and stores its key and value on the way.

    Slots: 0 q, 1 k, 2 v (float32, heads side by side), 3 K cache, 4 V cache, 5 bytes between KV
    heads of K, 6 of V, 7 heads, 8 KV heads, 9 head width, 10 rotated width, 11 rope table, 12 bytes
    of a table row, 13 pairs side by side (1) or half-split (0), 14 q norm (0: none), 15 k norm,
    16 eps, 17 scale of scores, 18 soft cap (0: none), 19 window (0: none), 20 out, 21 scratch,
    22 bytes between the threads' scratch, 23 partial results, 24 chunk counters (one a head, 0),
    25 address of the position, 26 chunks that partial results have room for, 33 bytes between
    chunks of K, 34 of V.
    Threads share the (head, chunk) pairs.
    """
    width = d16 * 16
    pair = d16 <= 4  # with few sums, two tokens at a time hide the latency of the additions

    def chunk(q: Any, k: Any, v: Any, t0: Any, t1: Any, low: Any, cap: Any, scores: Any,
              out: Any) -> None:  # fmt: skip
        # out: width values, unnormalised; then the maximum; then the sum
        for t in range(t0, t1, 64):
            acc = repeat(zeros_f32(1), 4)
            at = k + (t - t0) * (width * 2)
            for d in range(width):
                acc = fma(load_f16(at + d * 32, 4, width * 32), bcast_f32(q + d * 4, 1, 0), acc)
            store_f32(scores + (t - t0) * 4, acc, 64)
        most = splat_f32(_FLOOR)
        for t in range(t0, t1, 16):
            s = _mask(soften(load_f32(scores + (t - t0) * 4, 1, 0), cap), t, low, t1)
            store_f32(scores + (t - t0) * 4, s, 0)
            most = maximum(most, s)
        m = max_f32(most)
        top = splat_f32(m)
        total = zeros_f32(1)
        for t in range(t0, t1, 16):
            p = exp(load_f32(scores + (t - t0) * 4, 1, 0) - top)
            store_f32(scores + (t - t0) * 4, p, 0)
            total = total + p
        t = larger(t0, low)
        acc0 = repeat(zeros_f32(1), d16)
        if pair:
            acc1 = repeat(zeros_f32(1), d16)
            while t + 2 <= t1:
                p0 = bcast_f32(scores + (t - t0) * 4, 1, 0)
                p1 = bcast_f32(scores + ((t - t0) * 4 + 4), 1, 0)
                at = v + (t - t0) * (width * 2)
                acc0 = fma(load_f16(at, d16, 32), p0, acc0)
                acc1 = fma(load_f16(at + width * 2, d16, 32), p1, acc1)
                t += 2
            acc0 = acc0 + acc1
        while t < t1:
            p = bcast_f32(scores + (t - t0) * 4, 1, 0)
            acc0 = fma(load_f16(v + (t - t0) * (width * 2), d16, 32), p, acc0)
            t += 1
        store_f32(out, acc0, 64)
        put_f32(out + width * 4, m)
        put_f32(out + (width * 4 + 4), sum_f32(total))

    def finish(part: Any, scale: Any, out: Any, head: Any) -> None:
        if head % 16 == 0:
            for d in range(0, head, 16):
                store_f32(out + d * 4, load_f32(part + d * 4, 1, 0) * splat_f32(scale), 0)
        else:
            for d in range(head):
                put_f32(out + d * 4, get_f32(part + d * 4) * scale)

    def combine(parts: Any, n: Any, stride: Any, scratch: Any) -> Any:
        # scratch: the sum over chunks, rescaled to the common maximum; gives 1 / total
        m = get_f32(parts + width * 4)
        for c in range(1, n):
            m = larger(m, get_f32(parts + (c * stride + width * 4)))
        total = 0.0
        acc = repeat(zeros_f32(1), d16)
        for c in range(n):
            at = parts + c * stride
            weight = _exp1(get_f32(at + width * 4) - m)
            total += get_f32(at + (width * 4 + 4)) * weight
            acc = fma(load_f32(at, d16, 64), splat_f32(weight), acc)
        store_f32(scratch, acc, 64)
        return 1.0 / total

    def decode(args: Any, thread: Any, n_threads: Any) -> None:
        q = arg_ptr(args, 0)
        k = arg_ptr(args, 1)
        v = arg_ptr(args, 2)
        k_cache = arg_ptr(args, 3)
        v_cache = arg_ptr(args, 4)
        k_stride = arg_int(args, 5)
        v_stride = arg_int(args, 6)
        n_heads = arg_int(args, 7)
        n_kv = arg_int(args, 8)
        head = arg_int(args, 9)
        n_rot = arg_int(args, 10)
        paired = arg_int(args, 13)
        eps = arg_float(args, 16)
        cap = arg_float(args, 18)
        window = arg_int(args, 19)
        out = arg_ptr(args, 20)
        scratch = arg_ptr(args, 21) + arg_int(args, 22) * thread
        partial = arg_ptr(args, 23)
        counters = arg_ptr(args, 24)
        position = get_i64(arg_ptr(args, 25))
        stride = width * 4 + 64
        room = arg_int(args, 26)
        k_chunk = arg_int(args, 33)
        v_chunk = arg_int(args, 34)
        table = arg_ptr(args, 11) + position * arg_int(args, 12)
        low = 0
        if window > 0:
            low = larger(0, position + 1 - window)
        first_chunk = low // CHUNK
        n_chunks = position // CHUNK + 1 - first_chunk
        group = n_heads // n_kv
        units = n_heads * n_chunks
        rotated = scratch
        key = scratch + width * 4
        scores = scratch + 2 * width * 4
        result = scratch + (2 * width * 4 + CHUNK * 4)
        for d in range(head, width):
            put_f32(rotated + d * 4, 0.0)
        stored = -1
        ready = -1
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            kv = u // (group * n_chunks)
            c = (u % (group * n_chunks)) // group
            h = kv * group + u % group
            kc = k_cache + ((first_chunk + c) * k_chunk + kv * k_stride)
            vc = v_cache + ((first_chunk + c) * v_chunk + kv * v_stride)
            t0 = (first_chunk + c) * CHUNK
            t1 = smaller(t0 + CHUNK, position + 1)
            if c == n_chunks - 1 and stored != kv:
                # Several threads may store the same bytes; each does so before it reads them.
                rotate_head(k + kv * head * 4, key, head, n_rot, table, paired,
                            arg_int(args, 15), eps, 1.0)  # fmt: skip
                store_key(key, head, width, kc, position - t0)
                store_value(v + kv * head * 4, head, width, vc, position - t0)
                stored = kv
            if ready != h:
                rotate_head(q + h * head * 4, rotated, head, n_rot, table, paired,
                            arg_int(args, 14), eps, arg_float(args, 17))  # fmt: skip
                ready = h
            if n_chunks == 1:
                chunk(rotated, kc, vc, t0, t1, low, cap, scores, result)
                finish(result, 1.0 / get_f32(result + (width * 4 + 4)), out + h * head * 4, head)
            else:
                parts = partial + h * room * stride
                chunk(rotated, kc, vc, t0, t1, low, cap, scores, parts + c * stride)
                if atomic_add(counters + h * 8, 1) == n_chunks - 1:
                    atomic_put(counters + h * 8, 0)
                    scale = combine(parts, n_chunks, stride, result)
                    finish(result, scale, out + h * head * 4, head)

    return decode


def decode_scratch_bytes(head: int) -> int:
    """Scratch that each thread needs in decode."""
    return (3 * padded(head) + CHUNK + 16) * 4


# --- prefill: many queries ------------------------------------------------------------------------


def _rope(d16: int) -> KernelFunction:
    """Rotate the queries of a chunk of tokens, rotate and store their keys, store their values.

    Slots 0..16 and 25 as in decode (17: scale, put on the queries); 27 address of the token count,
    28..30 bytes between tokens of q, k, v; 31 rotated queries [token][head][D] float32;
    21, 22 scratch of 16 * D floats. Threads share the blocks of 16 positions.
    """
    width = d16 * 16

    def rope(args: Any, thread: Any, n_threads: Any) -> None:
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

    return rope


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if n % d == 0)


def _prefill(d16: int, target: Target) -> KernelFunction:
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
        most = splat_f32(_FLOOR)
        for t in range(t0, t1, 16):
            s = _mask(soften(load_f32(scores + (t - t0) * 4, 1, 0), cap), t, low, end)
            store_f32(scores + (t - t0) * 4, s, 0)
            most = maximum(most, s)
        old = get_f32(state)
        m = larger(old, max_f32(most))
        top = splat_f32(m)
        total = zeros_f32(1)
        for t in range(t0, t1, 16):
            p = exp(load_f32(scores + (t - t0) * 4, 1, 0) - top)
            store_f32(scores + (t - t0) * 4, p, 0)
            total = total + p
        keep = _exp1(old - m)
        put_f32(state, m)
        put_f32(state + 4, get_f32(state + 4) * keep + sum_f32(total))
        if keep != 1.0:
            for d in range(0, width, 16):
                store_f32(out + d * 4, load_f32(out + d * 4, 1, 0) * splat_f32(keep), 0)

    def prefill(args: Any, thread: Any, n_threads: Any) -> None:
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
            low = 0
            if window > 0:
                low = larger(0, start + 1 - window)
            end = start + n_queries
            for i in range(QUERIES):
                put_f32(state + i * 8, _FLOOR)
                put_f32(state + (i * 8 + 4), 0.0)
                for d in range(0, width, 16):
                    store_f32(sums + (i * width + d) * 4, zeros_f32(1), 0)
            for t0 in range((low // CHUNK) * CHUNK, end, CHUNK):
                t1 = smaller(t0 + CHUNK, end)
                kt = kc + t0 // CHUNK * arg_int(args, 33)
                vt = vc + t0 // CHUNK * arg_int(args, 34)
                for i in range(0, n_queries, 4):
                    scores_of(q + i * q_stride, q_stride, kt, t0, t1, scores + i * row)
                for i in range((n_queries + 3) // 4 * 4):
                    own_low = 0
                    if window > 0:
                        own_low = larger(0, start + i + 1 - window)
                    softmax(scores + i * row, t0, t1, start + i + 1, own_low, cap, state + i * 8,
                            sums + i * width * 4)  # fmt: skip
                for i in range(0, n_queries, 4):
                    values_of(vt, t0, larger(t0, low), smaller(t1, start + i + 4), scores + i * row,
                              sums + i * width * 4)  # fmt: skip
            for i in range(n_queries):
                scale = 1.0 / get_f32(state + (i * 8 + 4))
                to = arg_ptr(args, 20) + ((first + i) * out_stride + h * head * 4)
                if head % 16 == 0:
                    for d in range(0, head, 16):
                        at = sums + (i * width + d) * 4
                        store_f32(to + d * 4, load_f32(at, 1, 0) * splat_f32(scale), 0)
                else:
                    for d in range(head):
                        put_f32(to + d * 4, get_f32(sums + (i * width + d) * 4) * scale)

    return prefill


def _prefill_bf16(d16: int) -> KernelFunction:
    """As `_prefill`, with products of bfloat16 pairs; threads take (block of queries, KV head).

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
        most = splat_f32(_FLOOR)
        # Masks cost as much as the rest of this loop: only at the edges of what is visible.
        plain = larger(t0, smaller(t1, end // 16 * 16))
        first = smaller(plain, t0 + (larger(0, low - t0) + 15) // 16 * 16)
        for t in range(t0, t1, 16):
            s = soften(load_f32(scores + (t - t0) * 4, 1, 0), cap)
            if t < first or t >= plain:
                s = _mask(s, t, low, end)
                store_f32(scores + (t - t0) * 4, s, 0)
            elif cap > 0.0:
                store_f32(scores + (t - t0) * 4, s, 0)
            most = maximum(most, s)
        old = get_f32(state)
        m = larger(old, max_f32(most))
        top = splat_f32(m)
        total = zeros_f32(1)
        for t in range(t0, t1, 32):
            a = exp_down(load_f32(scores + (t - t0) * 4, 1, 0) - top)
            b = exp_down(load_f32(scores + ((t - t0) * 4 + 64), 1, 0) - top)
            store_i32(p + (t - t0) * 2, bf16_pairs(evens(a, b), odds(a, b)), 0)
            total = total + a + b
        keep = _exp1(old - m)
        put_f32(state, m)
        put_f32(state + 4, get_f32(state + 4) * keep + sum_f32(total))
        if keep != 1.0:
            for d in range(0, width, 16):
                store_f32(out + d * 4, load_f32(out + d * 4, 1, 0) * splat_f32(keep), 0)

    def prefill(args: Any, thread: Any, n_threads: Any) -> None:
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
            low = 0
            if window > 0:
                low = larger(0, start + 1 - window)
            end = start + n_queries
            for g in range(group):
                for i in range(n_queries):
                    at = (first + i) * n_heads + kv * group + g
                    convert_row(rotated + at * (width * 4), width,
                                coded + (g * queries + i) * (width * 2))  # fmt: skip
            for i in range(rows):
                put_f32(state + i * 8, _FLOOR)
                put_f32(state + (i * 8 + 4), 0.0)
                for d in range(0, width, 16):
                    store_f32(sums + (i * width + d) * 4, zeros_f32(1), 0)
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
                            own_low = 0
                            if window > 0:
                                own_low = larger(0, start + j + 1 - window)
                            softmax(scores + own * row, weights + own * (CHUNK * 2), t0, t0 + many,
                                    start + j + 1, own_low, cap, state + own * 8,
                                    sums + own * (width * 4))  # fmt: skip
                        values_of(values, skip, many, weights + r * (CHUNK * 2),
                                  sums + r * (width * 4))  # fmt: skip
            for g in range(group):
                for i in range(n_queries):
                    r = g * queries + i
                    scale = 1.0 / get_f32(state + (r * 8 + 4))
                    h = kv * group + g
                    to = arg_ptr(args, 20) + ((first + i) * out_stride + h * head * 4)
                    if head % 16 == 0:
                        for d in range(0, head, 16):
                            at = sums + (r * width + d) * 4
                            store_f32(to + d * 4, load_f32(at, 1, 0) * splat_f32(scale), 0)
                    else:
                        for d in range(head):
                            put_f32(to + d * 4, get_f32(sums + (r * width + d) * 4) * scale)

    return prefill


def prefill_scratch_bytes(head: int, group: int) -> int:
    """Scratch that each thread needs in prefill when `group` heads share a KV head."""
    width = padded(head)
    rope = 16 * width * 4
    plain = QUERIES * (CHUNK + width + 2) * 4
    rows = min(64, max(1, 64 // (group * 16)) * 16) * group
    pairs = 4 * CHUNK * width + rows * (CHUNK * 6 + width * 6 + 8)
    return max(rope, plain, pairs) + 64


# --- the rows of the table ------------------------------------------------------------------------


def kernels(head: int) -> dict[str, Kernel]:
    """Rows for a head width: "decode", "rope" and "prefill"."""
    d16 = padded(head) // 16
    sources = (__name__, "headrace.kernels.math")
    return {
        "decode": Kernel(
            f"attention_decode_d{d16 * 16}",
            lambda target: _decode(d16),
            sources,
            lambda target, rng: _cases("decode", head, target, rng),
        ),
        "rope": Kernel(
            f"attention_rope_d{d16 * 16}",
            lambda target: _rope(d16),
            sources,
            lambda target, rng: _cases("rope", head, target, rng),
        ),
        "prefill": Kernel(
            f"attention_prefill_d{d16 * 16}",
            lambda target: (
                _prefill_bf16(d16) if target.bf16_dot and d16 % 2 == 0 else _prefill(d16, target)
            ),
            sources,
            lambda target, rng: _cases("prefill", head, target, rng),
        ),
    }


def all_kernels() -> list[Kernel]:
    """Every row of this module for the head widths of common models."""
    return [kernel for head in (8, 64, 80, 128, 256) for kernel in kernels(head).values()]


def _rotated(x: np.ndarray, table: np.ndarray, n_rot: int, paired: int, norm: Any) -> np.ndarray:
    """Reference rope of [tokens, heads, head] in half-split order; table [tokens, n_rot]."""
    import numpy as np

    x = x.astype(np.float64)
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
    half = n_rot // 2
    a, b = (x[..., 0:n_rot:2], x[..., 1:n_rot:2]) if paired else (x[..., :half], x[..., half:n_rot])
    c, s = table[:, None, :half], table[:, None, half:]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., n_rot:]], axis=-1)


def _cases(kind: str, head: int, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    """One shape per feature: plain, sliding window, soft cap, norms, partial rotation."""
    import numpy as np

    settings = [
        # heads, kv, position, tokens, window, cap, paired, norms, rotated
        (6, 2, 0, 1, 0, 0.0, 1, False, head),
        (4, 4, 70, 21, 0, 30.0, 0, True, head),
        (6, 2, 530, 37, 300, 0.0, 1, False, head if head % 8 else head // 2),
    ]
    for n_heads, n_kv, position, tokens, window, cap, paired, norms, n_rot in settings:
        tokens = 1 if kind == "decode" else tokens
        width, total = padded(head), position + tokens
        room = -(-total // CHUNK) * CHUNK
        q = rng.standard_normal((tokens, n_heads, head)).astype(np.float32)
        k = rng.standard_normal((total, n_kv, head)).astype(np.float32)
        v = rng.standard_normal((total, n_kv, head)).astype(np.float32)
        angle = np.arange(total)[:, None] * 10000.0 ** -(np.arange(n_rot // 2) / (n_rot // 2))
        table = np.concatenate([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
        q_norm = rng.standard_normal(head).astype(np.float32) if norms else None
        k_norm = rng.standard_normal(head).astype(np.float32) if norms else None
        scale = np.float32(head**-0.5)
        # Reference: float64 attention over half-precision keys and values.
        keys = _rotated(k, table, n_rot, paired, k_norm).astype(np.float16)
        values = v.astype(np.float16)
        queries = _rotated(q, table[position:], n_rot, paired, q_norm) * scale
        expected = np.zeros((tokens, n_heads, head))
        for i in range(tokens):
            low = max(0, position + i + 1 - window) if window else 0
            span = slice(low, position + i + 1)
            for h in range(n_heads):
                g = h * n_kv // n_heads
                s = keys[span, g].astype(np.float64) @ queries[i, h]
                s = cap * np.tanh(s / cap) if cap else s
                p = np.exp(s - s.max())
                expected[i, h] = (p / p.sum()) @ values[span, g].astype(np.float64)
        k_cache = np.zeros((room // CHUNK, n_kv, CHUNK // 16, width, 16), np.float16)
        v_cache = np.zeros((room // CHUNK, n_kv, CHUNK, width), np.float16)
        full_k, full_v = k_cache.copy(), v_cache.copy()
        for cache_k, cache_v, n in ((full_k, full_v, total), (k_cache, v_cache, position)):
            by_token = np.zeros((n_kv, room, width), np.float16)
            by_token[:, :n, :head] = keys[:n].transpose(1, 0, 2)
            blocks = by_token.reshape(n_kv, room // CHUNK, CHUNK // 16, 16, width)
            cache_k[:] = blocks.transpose(1, 0, 2, 4, 3)
            by_token[:, :n, :head] = values[:n].transpose(1, 0, 2)
            cache_v[:] = by_token.reshape(n_kv, room // CHUNK, CHUNK, width).transpose(1, 0, 2, 3)
        if kind == "prefill":
            k_cache[:], v_cache[:] = full_k, full_v
        padded_tokens = -(-tokens // QUERIES) * QUERIES
        rotated = np.zeros((padded_tokens, n_heads, width), np.float32)
        if kind == "prefill":
            rotated[:tokens, :, :head] = queries
        out = np.zeros((tokens, n_heads, head), np.float32)
        new_k = np.ascontiguousarray(k[position:])
        new_v = np.ascontiguousarray(v[position:])
        n_bytes = max(decode_scratch_bytes(head), prefill_scratch_bytes(head, n_heads // n_kv))
        scratch = np.zeros((8, n_bytes), np.uint8)
        chunks = total // CHUNK + 1
        partial = np.zeros((n_heads, chunks, width + 16), np.float32)
        slots = [
            q, new_k, new_v, k_cache, v_cache, k_cache[0, 0].nbytes, v_cache[0, 0].nbytes, n_heads,
            n_kv, head, n_rot, table, n_rot * 4, paired, 0 if q_norm is None else q_norm,
            0 if k_norm is None else k_norm, 1e-5, float(scale), cap, window, out, scratch,
            n_bytes, partial, np.zeros(n_heads, np.int64), np.array([position], np.int64), chunks,
            np.array([tokens], np.int64), q[0].nbytes, new_k[0].nbytes, new_v[0].nbytes, rotated,
            out[0].nbytes, k_cache[0].nbytes, v_cache[0].nbytes,
        ]  # fmt: skip
        outputs: list[tuple[Any, Any]] = []
        if kind != "rope":
            outputs.append((out, expected))
        if kind != "prefill":
            outputs += [(k_cache, full_k), (v_cache, full_v)]
        if kind == "rope":
            want = np.zeros_like(rotated)
            want[:tokens, :, :head] = queries
            outputs.append((rotated, want))
        # A key may round to the neighbouring half, which moves a score by 2**-11 of its size.
        size = float(np.abs(queries).max() * np.abs(keys.astype("f4")).max())
        # bfloat16 products: 2**-8 of every score and of every weight and value.
        pairs = kind == "prefill" and target.bf16_dot
        tolerance = (2.0**-6 if pairs else 2.0**-10) * max(1.0, size)
        yield Case(slots, outputs, tolerance, f"{n_heads}/{n_kv}x{head} at {position}+{tokens}")
