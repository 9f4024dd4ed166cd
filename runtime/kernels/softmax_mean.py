"""Means of values under a softmax, for groups of channels of each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp_down
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    fma,
    load_f32,
    max_f32,
    maximum,
    put_f32,
    splat_f32,
    sum_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def softmax_mean(args: Any, thread: Any, n_threads: Any) -> None:
    """y[group] = sum over its bins of softmax(x) w. Threads share the pixels.

    Slots: 0 x, 1 y, 2 w of the bins of a group, 3 pixels, 4 groups, 5 vectors of 16 bins of each,
    6 and 7 bytes between pixels of x and y. Nothing is written beside the groups.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    weights = arg_ptr(args, 2)
    pixels = arg_int(args, 3)
    groups = arg_int(args, 4)
    vectors = arg_int(args, 5)
    x_step = arg_int(args, 6)
    y_step = arg_int(args, 7)
    for i in range(pixels * thread // n_threads, pixels * (thread + 1) // n_threads):
        p = x + i * x_step
        for group in range(groups):
            most = load_f32(p, 1, 0)
            for v in range(1, vectors):
                most = maximum(most, load_f32(p + v * 64, 1, 0))
            top = splat_f32(max_f32(most))
            total = zeros_f32(1)
            weighted = zeros_f32(1)
            for v in range(vectors):
                e = exp_down(load_f32(p + v * 64, 1, 0) - top)
                total = total + e
                weighted = fma(e, load_f32(weights + v * 64, 1, 0), weighted)
            put_f32(y + (i * y_step + group * 4), sum_f32(weighted) / sum_f32(total))
            p = p + vectors * 64


# --- references and cases -------------------------------------------------------------------------


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for pixels, groups, vectors in ((7, 4, 1), (3, 1, 3), (2, 5, 2)):
        bins = 16 * vectors
        x = (rng.standard_normal((pixels, groups * bins + 16)) * 4).astype(np.float32)
        x[0, :4] = 1e30, -1e30, 100.0, -100.0
        w = np.arange(bins, dtype=np.float32)
        y = np.full((pixels, 16), 7, np.float32)
        v = x[:, : groups * bins].reshape(pixels, groups, bins).astype(np.float64)
        likely = np.exp(v - v.max(-1, keepdims=True))
        expected = y.copy()
        expected[:, :groups] = (likely * w).sum(-1) / likely.sum(-1)
        slots = [x, y, w, pixels, groups, vectors, x.strides[0], y.strides[0]]
        # Arguments of exp are rounded at up to 30 in size, and it is good to 2e-7.
        bound = np.full(y.shape, bins * 2.0**-18)
        bound[:, groups:] = 0
        yield Case(slots, [(y, expected)], bound, f"{pixels}x{groups}x{bins}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.math")
    build = same_for_all(softmax_mean)
    return [Kernel("images_softmax_mean", build, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
