"""Attention of all tokens to all others, as encoders have it (Vaswani et al. 2017).

Queries, keys and values lie in rows of all heads, as projections give them: nothing is transposed
in memory but the keys of one head at a time. Of heads that fill no vectors, values and results are
copied as well: vectors would reach into the next head, and behind the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.convolution import FEW, pixels_at_once
from headrace.kernels.math import exp_down
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bcast_f32,
    by_token,
    fma_outer,
    get_f32,
    larger,
    load_f32,
    load_turned,
    max_f32,
    maximum,
    outer,
    put_f32,
    repeat,
    select_lt,
    smaller,
    splat_f32,
    store_f32,
    store_f32_grid,
    sum_f32,
    with_lanes,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

QUERIES = 128  # of a head, whose keys are transposed once
SPARE = 64 * FEW + 64  # bytes of scratch memory in front: vectors of some rows, a number of all
LEAST = -3.4028235e38  # of numbers
ABSENT = -float("inf")  # score of what fills the last vector of keys


def scratch_bytes(keys: int, head: int, most: int) -> int:
    """What a thread needs: the transposed keys of a head, and scores of the queries at once.

    Of heads of no multiple of 16 channels also values, and results.
    """
    padded, room = -(-keys // 16) * 16, -(-head // 16) * 16
    copies = (padded + most) * room if head % 16 else 0
    return SPARE + ((room + most) * padded + copies) * 4


def _kernel(target: Target) -> KernelFunction:
    """y = softmax(scale q k^T + mask) v, head by head.

    Slots: 0 q, 1 k, 2 v, 3 y, 4 mask (0: none), 5 images (of the batch), 6 heads, 7 channels of a
    head, 8 queries, 9 keys, 10 to 13 bytes between rows of q, k, v and y, whose pads become zero,
    14 scale (float32), 15 to 17 bytes between the mask's images, heads and queries, 18 scratch,
    19 its bytes for each thread, 20 whether a query whose keys are all masked (by -inf) gets zeros
    instead of no numbers. Threads share the heads, up to 128 queries of each at a time.
    """
    tiles, most = target.gemm_tiles, pixels_at_once(target)
    lanes = target.lanes("f32")
    wide = lanes * 4  # bytes of a vector

    def of(count: int) -> Any:
        def products(
            w: Any, w_step: Any, w_apart: Any, x: Any, x_step: Any, n: Any, y: Any, y_step: Any,
            columns: Any,
        ) -> None:  # fmt: skip
            """y [count][columns vectors] = sum over n of x [count][n] w [n][columns vectors]."""
            acc = outer(load_f32(w, columns, w_apart), bcast_f32(x, count, x_step))
            p = x + 4
            q = w + w_step
            left = n - 1
            while left >= 4:  # addresses of rows are formed once for four terms
                acc = fma_outer(load_f32(q, columns, w_apart), bcast_f32(p, count, x_step), acc)
                q = q + w_step
                acc = fma_outer(
                    load_f32(q, columns, w_apart), bcast_f32(p + 4, count, x_step), acc
                )  # fmt: skip
                q = q + w_step
                acc = fma_outer(
                    load_f32(q, columns, w_apart), bcast_f32(p + 8, count, x_step), acc
                )  # fmt: skip
                q = q + w_step
                acc = fma_outer(
                    load_f32(q, columns, w_apart), bcast_f32(p + 12, count, x_step), acc
                )  # fmt: skip
                p = p + 16
                q = q + w_step
                left -= 4
            while left > 0:
                acc = fma_outer(load_f32(q, columns, w_apart), bcast_f32(p, count, x_step), acc)
                p = p + 4
                q = q + w_step
                left -= 1
            store_f32_grid(y, by_token(acc), count, wide, y_step)

        def all_columns(
            w: Any, w_step: Any, w_apart: Any, x: Any, x_step: Any, n: Any, y: Any, y_step: Any,
            vectors: Any,
        ) -> None:  # fmt: skip
            v = 0
            if tiles > 1:
                while v + tiles <= vectors:
                    products(
                        w + v * w_apart, w_step, w_apart, x, x_step, n, y + v * wide, y_step, tiles
                    )
                    v += tiles
            while v < vectors:
                products(w + v * w_apart, w_step, w_apart, x, x_step, n, y + v * wide, y_step, 1)
                v += 1

        return all_columns

    many, few, one = of(most), of(FEW), of(1)

    def weighing(rows: int) -> Any:
        def weigh(
            scores: Any, step: Any, mask: Any, mask_step: Any, masked: Any, keys: Any, padded: Any,
            scale: Any, least: Any, spare: Any, inverses: Any,
        ) -> None:  # fmt: skip
            """Scores of some rows become weights, and what makes these add up to 1 is stored."""
            factor = repeat(splat_f32(scale), rows)
            whole = keys // lanes * lanes
            top = repeat(splat_f32(least), rows)
            for j in range(0, whole, lanes):
                score = load_f32(scores + j * 4, rows, step) * factor
                if masked:
                    score = score + load_f32(mask + j * 4, rows, mask_step)
                store_f32(scores + j * 4, score, step)
                top = maximum(top, score)
            store_f32(spare, top, wide)
            for r in range(rows):
                highest = max_f32(load_f32(spare + r * wide, 1, 0))
                row = scores + r * step
                for j in range(whole, keys):
                    last = get_f32(row + j * 4) * scale
                    if masked:
                        last = last + get_f32(mask + (r * mask_step + j * 4))
                    put_f32(row + j * 4, last)
                    highest = larger(highest, last)
                for j in range(keys, padded):
                    put_f32(row + j * 4, ABSENT)
                put_f32(inverses + r * 4, highest)
            top = bcast_f32(inverses, rows, 4)
            total = repeat(zeros_f32(1), rows)
            for j in range(0, padded, lanes):
                apart = load_f32(scores + j * 4, rows, step) - top
                weight = select_lt(
                    apart, repeat(splat_f32(-87.0), rows), repeat(zeros_f32(1), rows),
                    exp_down(apart),
                )  # fmt: skip
                store_f32(scores + j * 4, weight, step)
                total = total + weight
            store_f32(spare, total, wide)
            for r in range(rows):
                whole_sum = sum_f32(load_f32(spare + r * wide, 1, 0))
                inverse = whole_sum
                if whole_sum != 0.0:
                    inverse = 1.0 / whole_sum
                put_f32(inverses + r * 4, inverse)

        return weigh

    weigh_few, weigh_one = weighing(FEW), weighing(1)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        masked = arg_int(args, 4) != 0
        heads = arg_int(args, 6)
        head = arg_int(args, 7)
        queries = arg_int(args, 8)
        keys = arg_int(args, 9)
        q_row = arg_int(args, 10)
        k_row = arg_int(args, 11)
        v_row = arg_int(args, 12)
        y_row = arg_int(args, 13)
        scale = arg_float(args, 14)
        mask_row = arg_int(args, 17)
        # Below the least of all scores, all weights of a query become zeros.
        least = -float("inf")
        if arg_int(args, 20) != 0:
            least = LEAST
        spare = arg_ptr(args, 18) + arg_int(args, 19) * thread
        inverses = spare + FEW * wide
        turned = spare + SPARE
        padded = (keys + lanes - 1) // lanes * lanes
        vectors = (head + lanes - 1) // lanes
        room = vectors * lanes
        even = head // lanes * lanes  # channels that fill vectors
        scores = turned + padded * room * 4
        score_row = padded * 4
        copied = scores + most * score_row
        made = copied + padded * room * 4
        blocks = (queries + QUERIES - 1) // QUERIES
        units = arg_int(args, 5) * heads * blocks
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            image = u // (heads * blocks)
            h = u // blocks % heads
            first = u % blocks * QUERIES
            last = smaller(first + QUERIES, queries)
            k = arg_ptr(args, 1) + (image * keys * k_row + h * head * 4)
            v = arg_ptr(args, 2) + (image * keys * v_row + h * head * 4)
            mask = arg_ptr(args, 4) + (image * arg_int(args, 15) + h * arg_int(args, 16))
            # Vectors of keys: [padded / lanes][room][lanes].
            whole = keys // lanes * lanes
            if even < head and whole == keys:
                whole -= lanes  # the last rows are read by channels
            for j in range(0, whole, lanes):
                for d in range(0, head, lanes):
                    block = load_turned(k + (j * k_row + d * 4), k_row)
                    store_f32(turned + (j * room + d * lanes) * 4, block, wide)
            for j in range(whole, keys):
                to = turned + (whole * room + j - whole) * 4
                for d in range(head):
                    put_f32(to + d * wide, get_f32(k + (j * k_row + d * 4)))
            for j in range(keys, padded):
                to = turned + (whole * room + j - whole) * 4
                for d in range(head):
                    put_f32(to + d * wide, 0.0)
            v_step = v_row
            if even < head:
                for j in range(keys):
                    for d in range(0, even, lanes):
                        store_f32(
                            copied + (j * room + d) * 4, load_f32(v + (j * v_row + d * 4), 1, 0), 0
                        )  # fmt: skip
                    for d in range(even, head):
                        put_f32(copied + (j * room + d) * 4, get_f32(v + (j * v_row + d * 4)))
                    for d in range(head, room):
                        put_f32(copied + (j * room + d) * 4, 0.0)
                v = copied
                v_step = room * 4
            t = first
            while t < last:
                n = 1
                if last - t >= most:
                    n = most
                elif last - t >= FEW:
                    n = FEW
                q = arg_ptr(args, 0) + ((image * queries + t) * q_row + h * head * 4)
                y = arg_ptr(args, 3) + ((image * queries + t) * y_row + h * head * 4)
                out = y
                out_row = y_row
                if even < head:
                    out = made
                    out_row = room * 4
                if n == most:
                    many(
                        turned, wide, room * wide, q, q_row, head, scores, score_row,
                        padded // lanes,
                    )  # fmt: skip
                elif n == FEW:
                    few(
                        turned, wide, room * wide, q, q_row, head, scores, score_row,
                        padded // lanes,
                    )  # fmt: skip
                else:
                    one(
                        turned, wide, room * wide, q, q_row, head, scores, score_row,
                        padded // lanes,
                    )  # fmt: skip
                r = 0
                while r < n:
                    row = scores + r * score_row
                    row_mask = mask + (t + r) * mask_row
                    if n - r >= FEW:
                        weigh_few(
                            row, score_row, row_mask, mask_row, masked, keys, padded, scale, least,
                            spare, inverses + r * 4,
                        )  # fmt: skip
                        r += FEW
                    else:
                        weigh_one(
                            row, score_row, row_mask, mask_row, masked, keys, padded, scale, least,
                            spare, inverses + r * 4,
                        )  # fmt: skip
                        r += 1
                if n == most:
                    many(v, v_step, wide, scores, score_row, keys, out, out_row, vectors)
                elif n == FEW:
                    few(v, v_step, wide, scores, score_row, keys, out, out_row, vectors)
                else:
                    one(v, v_step, wide, scores, score_row, keys, out, out_row, vectors)
                for r in range(n):
                    inverse = get_f32(inverses + r * 4)
                    found = out + r * out_row
                    to = y + r * y_row
                    for d in range(0, even, lanes):
                        store_f32(to + d * 4, load_f32(found + d * 4, 1, 0) * splat_f32(inverse), 0)
                    for d in range(even, head):
                        put_f32(to + d * 4, get_f32(found + d * 4) * inverse)
                    if h == heads - 1:
                        for d in range(head, y_row // 4 - h * head):
                            put_f32(to + d * 4, 0.0)
                t += n

    return with_lanes(kernel, lanes)


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """In float64: the result, and how large its terms are, both [images, heads, queries, channels].

    Args:
        q, k, v: [images, heads, tokens, channels].
        mask: that is added, of shapes that spread over [images, heads, queries, keys].
    """
    import numpy as np

    q, k, v = (one.astype(np.float64) for one in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    if mask is not None:  # in float32, where masks of the largest number leave nothing of scores
        scores = (scores.astype(np.float32) + mask).astype(np.float64)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
    return weights @ v, weights @ np.abs(v)


# Images, heads, channels of a head, queries, keys, spread of the scores.
_SHAPES = ((1, 2, 16, 9, 9, 1), (2, 3, 32, 21, 37, 4), (1, 1, 48, 1, 1, 1), (1, 2, 16, 130, 16, 8),
           (1, 3, 15, 21, 16, 1), (2, 2, 40, 5, 33, 2), (1, 5, 3, 9, 1, 1))  # fmt: skip


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, heads, head, queries, keys, spread) in enumerate(_SHAPES):
        width = heads * head
        padded = -(-width // 16) * 16
        q = (rng.standard_normal((images, queries, width)) * spread).astype(np.float32)
        k, v = rng.standard_normal((2, images, keys, width)).astype(np.float32)
        mask, steps = None, (0, 0, 0)
        if i % 2:  # one for each image, with keys that are far below all others
            mask = np.where(rng.random((images, 1, 1, keys)) < 0.3, -3.4e38, 0)
            mask = mask.astype(np.float32)
            mask[0] = -3.4e38  # all keys of an image
            steps = (keys * 4, 0, 0)
        y = np.full((images, queries, padded), np.nan, np.float32)
        scale = head**-0.5
        q_heads, k_heads, v_heads = (
            one.reshape(images, -1, heads, head).transpose(0, 2, 1, 3) for one in (q, k, v)
        )  # fmt: skip
        exact, size = reference(q_heads, k_heads, v_heads, mask, scale)
        expected, size = (
            np.pad(
                one.transpose(0, 2, 1, 3).reshape(images, queries, width),
                ((0, 0), (0, 0), (0, padded - width)),
            )
            for one in (exact, size)
        )
        n_bytes = scratch_bytes(keys, head, pixels_at_once(target))
        scratch = np.zeros(8 * n_bytes, np.uint8)
        slots = [
            q, k, v, y, 0 if mask is None else mask, images, heads, head, queries, keys,
            *[width * 4] * 3, padded * 4, float(np.float32(scale)), *steps, scratch, n_bytes, 0,
        ]  # fmt: skip
        # A score is off by a unit of each of its terms; its exponential by as much, relatively.
        largest = float(np.abs(q).max() * np.abs(k).max()) * head * scale
        bound = size * ((largest * head + keys + 8) * 2.0**-23) + 1e-30
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{heads}x{head}, {queries}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.math", "headrace.kernels.convolution")
    return [Kernel("attention_rows_f32", _kernel, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
