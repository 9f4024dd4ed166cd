"""What the attention kernels share of their softmax: masks, soft caps, running maxima and sums."""

from __future__ import annotations

from typing import Any

from headrace.kernels.math import exp, tanh
from headrace.targets.simd import (
    get_f32,
    iota_i32,
    lane0,
    larger,
    load_f32,
    put_f32,
    select_lt,
    splat_f32,
    splat_i32,
    store_f32,
    zeros_f32,
)

_MASKED = -1e30
FLOOR = -1e29  # a row maximum is at least this, so that masked scores vanish in exp


def first_seen(position: Any, window: Any) -> Any:
    """The first position that the token at `position` attends to; no window: 0."""
    low = 0
    if window > 0:
        low = larger(0, position + 1 - window)
    return low


def soften(score: Any, cap: Any) -> Any:
    """cap * tanh(score / cap), or the score where cap is 0 (logit soft-capping of Gemma 2)."""
    if cap > 0.0:
        score = splat_f32(cap) * tanh(score / splat_f32(cap))
    return score


def mask(score: Any, at: Any, low: Any, high: Any) -> Any:
    """Scores of 16 positions from `at`, those outside low..high-1 masked."""
    position = iota_i32() + splat_i32(at)
    masked = splat_f32(_MASKED)
    score = select_lt(position, splat_i32(high), score, masked)
    return select_lt(position, splat_i32(low), masked, score)


def exp_one(x: Any) -> Any:
    """exp of one float."""
    return lane0(exp(splat_f32(x)))


def begin_row(state: Any, sums: Any, width: Any) -> None:
    """Start a query: `state` is its running maximum and sum, `sums` its weighted values."""
    put_f32(state, FLOOR)
    put_f32(state + 4, 0.0)
    for d in range(0, width, 16):
        store_f32(sums + d * 4, zeros_f32(1), 0)


def add_to_row(state: Any, sums: Any, width: Any, m: Any, total: Any) -> None:
    """Count more weights, relative to a maximum `m` no less than the one so far: sum `total`."""
    keep = exp_one(get_f32(state) - m)
    put_f32(state, m)
    put_f32(state + 4, get_f32(state + 4) * keep + total)
    if keep != 1.0:
        for d in range(0, width, 16):
            store_f32(sums + d * 4, load_f32(sums + d * 4, 1, 0) * splat_f32(keep), 0)


def finish_row(sums: Any, total: Any, out: Any, head: Any) -> None:
    """out = sums / total, `head` values."""
    scale = 1.0 / total
    if head % 16 == 0:
        for d in range(0, head, 16):
            store_f32(out + d * 4, load_f32(sums + d * 4, 1, 0) * splat_f32(scale), 0)
    else:
        for d in range(head):
            put_f32(out + d * 4, get_f32(sums + d * 4) * scale)
