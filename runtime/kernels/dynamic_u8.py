"""Activations that are quantised as they come, by the range of all (ONNX's DynamicQuantizeLinear).

scale = (max(0, largest) - min(0, least)) / 255        1 where all are 0
zero  = round(-min(0, least) / scale)
q     = saturate(round(x / scale) + zero)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.images_u8 import bounded
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    fma,
    get_f32,
    larger,
    load_f32,
    load_i32,
    max_f32,
    maximum,
    put_f32,
    round_i32,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    store_i8,
    store_i32,
    sum_i32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

PART = 64  # bytes between the ranges that threads found
MOST_THREADS = 256
SMALL = 1e-35  # scales below have reciprocals that are no good


def value_range(args: Any, thread: Any, n_threads: Any) -> None:
    """The least and the largest of 0 and a value's elements. Threads share the rows.

    What stands in the last vector of a row behind its channels is anything: half of 1 where a
    sigmoid made the value, or what was there before it.

    Slots: 0 x, 1 rows, 2 channels, 3 padded (elements of a row, to 16), 4 out: -least and largest
    of each thread, 64 bytes apart.
    """
    x = arg_ptr(args, 0)
    rows = arg_int(args, 1)
    channels = arg_int(args, 2)
    padded = arg_int(args, 3)
    whole = channels // 16 * 16
    least = zeros_f32(1)
    most = zeros_f32(1)
    for r in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        p = x + r * padded * 4
        for c in range(0, whole, 16):
            value = load_f32(p + c * 4, 1, 0)
            least = maximum(least, splat_f32(0.0) - value)
            most = maximum(most, value)
        if whole < channels and whole > 0:
            value = load_f32(p + (channels - 16) * 4, 1, 0)  # some once more
            least = maximum(least, splat_f32(0.0) - value)
            most = maximum(most, value)
        elif whole == 0:
            for c in range(channels):
                value = splat_f32(get_f32(p + c * 4))
                least = maximum(least, splat_f32(0.0) - value)
                most = maximum(most, value)
    out = arg_ptr(args, 4) + thread * PART
    put_f32(out, max_f32(least))
    put_f32(out + 4, max_f32(most))


def quantise_rows(args: Any, thread: Any, n_threads: Any) -> None:
    """Rows of float32 as bytes, and what a product of them with int8 weights ends with.

    Slots: 0 x, 1 y, 2 rows, 3 padded (elements of a row of x, to 16), 4 bytes of a row of y,
    5 ranges of all threads, 6 tiles of the product, 7 its weights' scales, 8 its weights' sums
    (int32), 9 its bias, each of 16 a tile, 10 its tails (`weights_u8.tails`). Threads share the
    rows, and the tiles.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    rows = arg_int(args, 2)
    padded = arg_int(args, 3)
    row_bytes = arg_int(args, 4)
    scale, zero = scale_and_zero(arg_ptr(args, 5), n_threads)
    inverse = 1.0 / scale
    for r in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        p = x + r * padded * 4
        to = y + r * row_bytes
        if scale < SMALL:
            for c in range(0, padded, 16):
                found = load_f32(p + c * 4, 1, 0) / splat_f32(scale)
                store_i8(to + c, bounded(found, zero, 0, 255), 0)
        else:
            for c in range(0, padded, 16):
                value = load_f32(p + c * 4, 1, 0)
                found = quotient(value, splat_f32(0.0 - scale), splat_f32(inverse))
                store_i8(to + c, bounded(found, zero, 0, 255), 0)
    write_tails(args, thread, n_threads, scale, zero)


def quotient(x: Any, negative: Any, inverse: Any) -> Any:
    """x / scale by its reciprocal, put right by what the first quotient leaves (Markstein 1990).

    A division takes as long as 16 other instructions. The scale, which comes with the other sign,
    is at least `SMALL`.
    """
    first = x * inverse
    left = fma(negative, first, x)
    return fma(left, inverse, first)


def scale_and_zero(ranges: Any, n_threads: Any) -> Any:
    """Of a value, out of the ranges that threads found."""
    least = get_f32(ranges)
    most = get_f32(ranges + 4)
    for t in range(1, n_threads):
        least = larger(least, get_f32(ranges + t * PART))
        most = larger(most, get_f32(ranges + (t * PART + 4)))
    scale = (most + least) / 255.0
    if scale == 0.0:
        scale = scale + 1.0
    # As integer lanes: 32-bit ARM has no instruction for a float to an address-sized integer.
    zero = smaller(larger(sum_i32(round_i32(splat_f32(least / scale))) // 16, 0), 255)
    return scale, zero


def write_tails(args: Any, thread: Any, n_threads: Any, scale: Any, zero: Any) -> None:
    """What a product ends with: slots 6 to 10 of `quantise_rows`. Threads share the tiles."""
    tiles = arg_int(args, 6)
    factors = arg_ptr(args, 7)
    sums = arg_ptr(args, 8)
    bias = arg_ptr(args, 9)
    tails = arg_ptr(args, 10)
    for t in range(tiles * thread // n_threads, tiles * (thread + 1) // n_threads):
        total = load_i32(sums + t * 64, 1, 0)
        to = tails + t * 256
        store_i32(to, total * (splat_i32(0) - splat_i32(zero)), 0)
        store_f32(to + 64, load_f32(factors + t * 64, 1, 0) * splat_f32(scale), 0)
        store_i32(to + 128, total * splat_i32(128), 0)
        store_f32(to + 192, load_f32(bias + t * 64, 1, 0), 0)


def reference(x: np.ndarray) -> tuple[np.ndarray, np.float32, int]:
    """Codes, scale and zero point of a value."""
    import numpy as np

    least, most = np.float32(min(0, x.min())), np.float32(max(0, x.max()))
    scale = np.float32((most - least) / np.float32(255)) or np.float32(1)
    zero = int(np.clip(np.rint(np.float32(-least / scale)), 0, 255))
    codes = np.clip(np.rint((x / scale).astype(np.float64)) + zero, 0, 255)
    return codes.astype(np.uint8), scale, zero


def _range_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for n, channels, shift in ((7, 16, 0.0), (3, 48, 9.0), (5, 37, -9.0), (9, 6, 0.0), (1, 17, 9)):
        padded = -(-channels // 16) * 16
        x = np.full((n, padded), 99 * (-1) ** n, np.float32)  # behind the channels, of no account
        part = x[:, :channels] = (rng.standard_normal((n, channels)) + shift).astype(np.float32)
        out = np.zeros((8, PART // 4), np.float32)
        expected = np.zeros(2, np.float32)
        expected[:] = max(0, -part.min()), max(0, part.max())

        def together(found: np.ndarray, wanted: np.ndarray) -> bool:
            """However many threads share the vectors, together they find the same."""
            return bool((found[:, :2].max(0) == wanted[0, :2]).all())

        whole = np.zeros_like(out)
        whole[0, :2] = expected
        slots = [x, n, channels, padded, out]
        yield Case(slots, [(out, whole)], together, f"{n}x{channels} about {shift}")


def ends_of(
    x: np.ndarray, tiles: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[Any], np.ndarray]:
    """Of a case: codes of x, slots 5 to 10, the last of which is tails, and what these become."""
    import numpy as np

    codes, scale, zero = reference(x)
    ranges = np.zeros((8, PART // 4), np.float32)
    ranges[:, 0], ranges[:, 1] = max(0, -x.min()), max(0, x.max())
    factors = rng.uniform(0.1, 2, tiles * 16).astype(np.float32)
    sums = rng.integers(-9999, 9999, tiles * 16).astype(np.int32)
    bias = rng.standard_normal(tiles * 16).astype(np.float32)
    tails = np.zeros((tiles, 4, 16), np.int32)
    expected = np.zeros_like(tails)
    shape = (tiles, 16)
    expected[:, 0] = (-zero * sums).reshape(shape)
    expected[:, 1] = (factors * scale).view(np.int32).reshape(shape)
    expected[:, 2] = (128 * sums).reshape(shape)
    expected[:, 3] = bias.view(np.int32).reshape(shape)
    return codes, [ranges, tiles, factors, sums, bias, tails], expected


def _quantise_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    shapes = ((3, 48, 2, 1.0), (5, 16, 1, 1e-3), (1, 32, 3, 0.0), (3, 16, 1, 1e-34))
    for rows, padded, tiles, spread in shapes:
        x = (rng.standard_normal((rows, padded)) * spread).astype(np.float32)
        y = np.zeros((rows, padded), np.uint8)
        codes, ends, expected = ends_of(x, tiles, rng)
        slots = [x, y, rows, padded, padded, *ends]
        tails = ends[-1]
        yield Case(slots, [(y, codes), (tails, expected)], 0, f"{rows}x{padded}, {tiles} tiles")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.images_u8")
    return [
        Kernel("dynamic_range", same_for_all(value_range), sources, _range_cases, __name__),
        Kernel("dynamic_rows", same_for_all(quantise_rows), sources, _quantise_cases, __name__),
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
