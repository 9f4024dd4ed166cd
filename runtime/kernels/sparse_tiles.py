"""Products of pixels with weights that are there, or not, for 16 neighbouring outputs at once.

Group sparsity as in SparseByteNN, for float32: 16 outputs are a vector, an input of a
pixel multiplies it, and nothing is done for inputs that no output of the 16 has a weight for. So
images are read and written as they lie, at the rate of dense products; nothing is turned as where
weights are there for fewer outputs (`headrace.kernels.sparse_product`, which packs the weights).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from headrace.kernels.convolution import FEW, pixels_at_once
from headrace.kernels.sparse_product import SLAB, cases_of, entry_bytes, kernel_of
from headrace.sparse.format import TILE_ROWS
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    by_token,
    fma_columns,
    get_i32,
    get_i64,
    load_f32,
    load_f32_grid,
    maximum,
    minimum,
    outer,
    prefetch,
    repeat,
    splat_f32,
    store_f32_grid,
    strip,
    with_lanes,
)
from headrace.targets.table import Kernel, KernelFunction
from headrace.targets.target import Target

# Pixels so many bytes apart share few sets of a first cache of 32 KiB, whose 8 lines do not hold
# what more pixels read.
_SETS = 2048
_AHEAD = 40 * entry_bytes(TILE_ROWS)


def _sparse(target: Target) -> KernelFunction:
    """y = clamp(bias + sum over channels of w x, or with what is there added to it).

    Slots are those of `headrace.kernels.sparse_product`; there is no scratch. Threads share the
    pixels, or, where these are few, the tiles.
    """
    lanes = target.lanes("f32")
    strips = TILE_ROWS // lanes
    many = pixels_at_once(target) * target.gemm_tiles  # sums, as dense products have
    n_bytes = entry_bytes(TILE_ROWS)

    def of(count: int) -> Any:
        def some(
            entry: Any, w: Any, counts: Any, x: Any, y: Any, bias: Any, more: Any, slabs: Any,
            pixel: Any, out_pixel: Any, least: Any, highest: Any, adds: Any,
        ) -> None:  # fmt: skip
            acc = outer(load_f32(bias, 1, 64), repeat(splat_f32(1.0), count))
            for slab in range(slabs):
                left = get_i32(counts + slab * 4)
                while left > 0:
                    prefetch(entry + _AHEAD)
                    acc = fma_columns(acc, w, x + get_i32(entry), 1, 1, 0, count, pixel)
                    entry = entry + n_bytes
                    w = w + n_bytes
                    left -= 1
                x = x + SLAB * 4
            found = by_token(acc)
            if adds:
                found = found + load_f32_grid(more, 1, count, 64, out_pixel)
            low = repeat(splat_f32(least), count)
            high = repeat(splat_f32(highest), count)
            store_f32_grid(y, minimum(high, maximum(found, low)), count, 64, out_pixel)

        return some

    whole, one = of(many), of(1)
    eights, sevens, sixes, fives, fours = (of(n) for n in (8, 7, 6, 5, 4))

    def sparse(args: Any, thread: Any, n_threads: Any) -> None:
        stream = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        bias = arg_ptr(args, 3)
        more = arg_ptr(args, 4)
        adds = arg_int(args, 4) != 0
        slabs = (arg_int(args, 5) + SLAB - 1) // SLAB
        n_tiles = arg_int(args, 6)
        least = arg_float(args, 7)
        highest = arg_float(args, 8)
        pixels = arg_int(args, 9)
        pixel = arg_int(args, 10)
        out_pixel = arg_int(args, 11)
        counts = arg_ptr(args, 12)
        starts = arg_ptr(args, 13)
        spread = pixel % _SETS != 0
        t = 0
        end = n_tiles
        parts = (pixels + FEW - 1) // FEW
        first = parts * thread // n_threads * FEW
        last = pixels
        if thread + 1 < n_threads:
            last = parts * (thread + 1) // n_threads * FEW
        if pixels < 2 * many * n_threads:
            first = 0
            last = pixels
            t = n_tiles * thread // n_threads
            end = n_tiles * (thread + 1) // n_threads
        while t < end:
            row = t * slabs
            entry = stream + get_i64(starts + row * 8)
            for s in range(strips):
                column = t * 64 + s * lanes * 4
                at = first
                while at < last:
                    to = at * out_pixel + column
                    given = (
                        entry, strip(entry + 4, s), counts + row * 4, x + at * pixel, y + to,
                        bias + column, more + to, slabs, pixel, out_pixel, least, highest, adds,
                    )  # fmt: skip
                    left = last - at
                    n = 1
                    if left >= many and spread:
                        n = many
                        whole(*given)
                    elif left >= FEW:
                        blocks = (left + 7) // 8
                        n = (left + blocks - 1) // blocks  # all about as long
                        if n == 8:
                            eights(*given)
                        elif n == 7:
                            sevens(*given)
                        elif n == 6:
                            sixes(*given)
                        elif n == 5:
                            fives(*given)
                        else:
                            n = FEW
                            fours(*given)
                    else:
                        one(*given)
                    at += n
            t += 1

    return with_lanes(sparse, lanes)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = __name__, "headrace.kernels.sparse_product", "headrace.sparse.format"
    cases = partial(cases_of, TILE_ROWS)
    return [Kernel(kernel_of(TILE_ROWS), _sparse, sources, cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
