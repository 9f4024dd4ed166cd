"""Images of bytes: sums of two, and means of all pixels.

Layout and rounding: `headrace.kernels.requantise`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.images_u8 import QUANTISED, SHAPES, bounded, random_bytes
from headrace.kernels.requantise import (
    dequantised,
    pixel_bytes,
    quantised,
    requantised,
    rounding_slots,
)
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bits_i32,
    interleave4,
    join4,
    load_u8,
    load_u8_i32,
    maximum,
    minimum,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    store_i8,
    store_u8,
    to_bytes,
    to_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

FAR = 2.0**20  # from all bytes, and still an integer


def _widened(p: Any) -> Any:
    """64 bytes as int32, in the order of `to_bytes`."""
    code = load_u8(p, 1, 0)
    none = code ^ code
    return bits_i32(interleave4(join4(code, none, none, none)))


def add(args: Any, thread: Any, n_threads: Any) -> None:
    """y = QuantizeLinear(DequantizeLinear(a) + DequantizeLinear(b)), or of a alone.

    Slots: 0 a, 1 b (0: none), 2 y, 3 bytes (at least 64), 4 and 5 scale and zero point of a, 6 and
    7 of b, 8 scale of y, 9 zero point of y, 10 least, 11 most. Threads share the bytes;
    the last 64 are those at the end.
    """
    a = arg_ptr(args, 0)
    b = arg_ptr(args, 1)
    adds = arg_int(args, 1) != 0
    y = arg_ptr(args, 2)
    n = arg_int(args, 3)
    a_scale = splat_f32(arg_float(args, 4))
    a_zero = splat_i32(arg_int(args, 5))
    b_scale = splat_f32(arg_float(args, 6))
    b_zero = splat_i32(arg_int(args, 7))
    scale = splat_f32(arg_float(args, 8))
    zero = splat_i32(arg_int(args, 9))
    least = splat_i32(arg_int(args, 10))
    most = splat_i32(arg_int(args, 11))
    units = (n + 63) // 64
    for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
        at = smaller(u * 64, n - 64)
        total = to_f32(_widened(a + at) - a_zero) * a_scale
        if adds:
            total = total + to_f32(_widened(b + at) - b_zero) * b_scale
        # What is far from all bytes is still an integer.
        found = minimum(splat_f32(FAR), maximum(total / scale, splat_f32(-FAR)))
        store_u8(y + at, to_bytes(found, zero, least, most))


def mean(args: Any, thread: Any, n_threads: Any) -> None:
    """Mean of all pixels of each image. Threads share the vectors of 16 channels.

    The sum is exact, and rounded once to float32; times `scale` it is a float32 result, or rounded
    to a byte.

    Slots: 0 x, 1 y, 2 images, 3 pixels, 4 padded (to 16), 5 bytes of a pixel of x, 6 of y, 7 zero
    point of x, 8 scale, 9 whether results are float32, 10 zero point, 11 least, 12 most.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    images = arg_int(args, 2)
    pixels = arg_int(args, 3)
    vectors = arg_int(args, 4) // 16
    stride = arg_int(args, 5)
    out_stride = arg_int(args, 6)
    x_zero = arg_int(args, 7)
    scale = splat_f32(arg_float(args, 8))
    floats = arg_int(args, 9) != 0
    zero = arg_int(args, 10)
    least = arg_int(args, 11)
    most = arg_int(args, 12)
    units = images * vectors
    for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
        image = u // vectors
        c = (u - image * vectors) * 16
        total = splat_i32(0 - pixels * x_zero)
        for p in range(pixels):
            total = total + load_u8_i32(x + ((image * pixels + p) * stride + c), 1, 0)
        found = to_f32(total) * scale
        if floats:
            store_f32(y + (image * out_stride + c * 4), found, 0)
        else:
            store_i8(y + (image * out_stride + c), bounded(found, zero, least, most), 0)


# --- cases ----------------------------------------------------------------------------------------


def _add_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, n in enumerate((64, 1000, 4096)):
        a, b = random_bytes(rng, n), random_bytes(rng, n)
        of, other, to = (QUANTISED[(i + k) % 3] for k in range(3))
        total = dequantised(a, of)
        if i != 1:
            total = total + dequantised(b, other)
        y = np.full(n, 77, np.uint8)
        slots = [
            a, b if i != 1 else 0, y, n, of.scale, of.zero, other.scale, other.zero, to.scale,
            *rounding_slots(to),
        ]  # fmt: skip
        yield Case(slots, [(y, quantised(total, to))], 0, f"{n}")


def _mean_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, channels, pixels) in enumerate(SHAPES[1:]):
        of, to, padded = QUANTISED[i], QUANTISED[(i + 1) % 3], -(-channels // 16) * 16
        x = random_bytes(rng, images, pixels, pixel_bytes(channels))
        scale = np.float32(of.scale / pixels / (1 if i == 1 else to.scale))
        sums = x[..., :padded].astype(np.int64).sum(1) - pixels * of.zero
        if i == 1:
            y = np.full((images, padded), np.nan, np.float32)
            expected = sums.astype(np.float32) * scale
        else:
            y = np.full((images, pixel_bytes(channels)), 77, np.uint8)
            expected = y.copy()
            expected[:, :padded] = requantised(sums, np.full(padded, scale), to)
        slots = [
            x, y, images, pixels, padded, x.shape[2], y.strides[0], of.zero, float(scale),
            int(i == 1), *rounding_slots(to),
        ]  # fmt: skip
        yield Case(slots, [(y, expected)], 0, f"{images}x{channels}x{pixels}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows = (("images_add_u8", add, _add_cases), ("images_mean_u8", mean, _mean_cases))
    sources = (__name__, "headrace.kernels.images_u8", "headrace.kernels.requantise")
    return [Kernel(name, same_for_all(fn), sources, cases, __name__) for name, fn, cases in rows]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
