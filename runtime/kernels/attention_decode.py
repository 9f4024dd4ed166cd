"""Attention of one query over the cache: the decode step.

Each chunk of the cache has its own softmax; they are combined in order of position, so that the
result depends neither on the number of threads nor on who computed which chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.kernels.kv_cache import CHUNK, padded, rotate_head, store_key, store_value
from headrace.kernels.math import exp
from headrace.kernels.softmax import FLOOR, exp_one, finish_row, first_seen, mask, soften
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    atomic_add,
    atomic_put,
    bcast_f32,
    fma,
    get_f32,
    get_i64,
    larger,
    load_f16,
    load_f32,
    max_f32,
    maximum,
    put_f32,
    repeat,
    smaller,
    splat_f32,
    store_f32,
    sum_f32,
    zeros_f32,
)
from headrace.targets.table import KernelFunction


def attend_chunk(d16: int) -> Callable[..., None]:
    """Attention of a rotated query over one chunk of the cache, up to its own position.

    `args` are those of the kernel, `c` counts chunks from the beginning of the cache, `low` is the
    first position that counts.
    """
    width = d16 * 16
    pair = d16 <= 4  # with few sums, two tokens at a time hide the latency of the additions

    def chunk(args: Any, q: Any, kv: Any, c: Any, position: Any, low: Any, scores: Any,
              out: Any) -> None:  # fmt: skip
        # out: width values, unnormalised; then the maximum; then the sum
        k = arg_ptr(args, 3) + (c * arg_int(args, 33) + kv * arg_int(args, 5))
        v = arg_ptr(args, 4) + (c * arg_int(args, 34) + kv * arg_int(args, 6))
        cap = arg_float(args, 18)
        t0 = c * CHUNK
        t1 = smaller(t0 + CHUNK, position + 1)
        for t in range(t0, t1, 64):
            acc = repeat(zeros_f32(1), 4)
            at = k + (t - t0) * (width * 2)
            for d in range(width):
                acc = fma(load_f16(at + d * 32, 4, width * 32), bcast_f32(q + d * 4, 1, 0), acc)
            store_f32(scores + (t - t0) * 4, acc, 64)
        most = splat_f32(FLOOR)
        for t in range(t0, t1, 16):
            s = mask(soften(load_f32(scores + (t - t0) * 4, 1, 0), cap), t, low, t1)
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

    return chunk


def combine_chunks(d16: int) -> Callable[..., None]:
    """A query's result from those of its chunks, in order of position."""
    width = d16 * 16

    def combine(parts: Any, n: Any, stride: Any, scratch: Any, out: Any, head: Any) -> None:
        # scratch: the sum over chunks, rescaled to the common maximum
        m = get_f32(parts + width * 4)
        for c in range(1, n):
            m = larger(m, get_f32(parts + (c * stride + width * 4)))
        total = 0.0
        acc = repeat(zeros_f32(1), d16)
        for c in range(n):
            at = parts + c * stride
            weight = exp_one(get_f32(at + width * 4) - m)
            total += get_f32(at + (width * 4 + 4)) * weight
            acc = fma(load_f32(at, d16, 64), splat_f32(weight), acc)
        store_f32(scratch, acc, 64)
        finish_row(scratch, total, out, head)

    return combine


def decode(d16: int) -> KernelFunction:
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
    chunk = attend_chunk(d16)
    combine = combine_chunks(d16)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
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
        low = first_seen(position, arg_int(args, 19))
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
            to = out + h * head * 4
            if c == n_chunks - 1 and stored != kv:
                # Several threads may store the same bytes; each does so before it reads them.
                rotate_head(k + kv * head * 4, key, head, n_rot, table, paired,
                            arg_int(args, 15), eps, 1.0)  # fmt: skip
                kc = k_cache + (position // CHUNK * k_chunk + kv * k_stride)
                vc = v_cache + (position // CHUNK * v_chunk + kv * v_stride)
                store_key(key, head, width, kc, position % CHUNK)
                store_value(v + kv * head * 4, head, width, vc, position % CHUNK)
                stored = kv
            if ready != h:
                rotate_head(q + h * head * 4, rotated, head, n_rot, table, paired,
                            arg_int(args, 14), eps, arg_float(args, 17))  # fmt: skip
                ready = h
            if n_chunks == 1:
                chunk(args, rotated, kv, first_chunk, position, low, scores, result)
                finish_row(result, get_f32(result + (width * 4 + 4)), to, head)
            else:
                parts = partial + h * room * stride
                chunk(args, rotated, kv, first_chunk + c, position, low, scores, parts + c * stride)
                if atomic_add(counters + h * 8, 1) == n_chunks - 1:
                    atomic_put(counters + h * 8, 0)
                    combine(parts, n_chunks, stride, result, to, head)

    return kernel


def decode_scratch_bytes(head: int) -> int:
    """Scratch that each thread needs in decode."""
    return (3 * padded(head) + CHUNK + 16) * 4
