"""Images that lie pixel by pixel, channels innermost and padded to 16: in, out, and means.

Planes are what ONNX has: [images][channels][rows][columns]. Kernels that read them take any part
of all planes (slots from 2 on): 2 images, 3 channels, 4 rows, 5 columns, 6 and 7 bytes between rows
and between planes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.finishes import INFINITE
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    get_f32,
    load_f32,
    maximum,
    minimum,
    put_f32,
    repeat,
    smaller,
    splat_f32,
    store_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def in_planes(row: Any, column: Any, channels: Any, rows: Any, row_bytes: Any, plane: Any) -> Any:
    """Where a pixel's first channel is in planes; rows of all images count, and bytes in a row."""
    image = row // rows
    return image * channels * plane + (row - image * rows) * row_bytes + column


def gather(args: Any, thread: Any, n_threads: Any) -> None:
    """Planes to pixel by pixel; pads become zero. Threads share the pixels.

    Slots: 0 x, 1 y [images][pixels][padded], 2 to 7 planes, 8 padded.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    channels = arg_int(args, 3)
    rows = arg_int(args, 4)
    columns = arg_int(args, 5)
    plane = arg_int(args, 7)
    padded = arg_int(args, 8)
    n = arg_int(args, 2) * rows * columns
    for p in range(n * thread // n_threads, n * (thread + 1) // n_threads):
        row = p // columns
        column = (p - row * columns) * 4
        source = x + in_planes(row, column, channels, rows, arg_int(args, 6), plane)
        to = y + p * padded * 4
        for c in range(channels):
            put_f32(to + c * 4, get_f32(source + c * plane))
        for c in range(channels, padded):
            put_f32(to + c * 4, 0.0)


def scatter(args: Any, thread: Any, n_threads: Any) -> None:
    """Pixel by pixel to channel by channel, without pads. Threads share the channels.

    Slots: 0 x [images][pixels][padded], 1 y [images][channels][pixels], 2 images, 3 channels,
    4 pixels, 5 padded.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    images = arg_int(args, 2)
    channels = arg_int(args, 3)
    pixels = arg_int(args, 4)
    padded = arg_int(args, 5)
    rows = images * channels
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        image = row // channels
        source = x + (image * pixels * padded + row - image * channels) * 4
        for p in range(pixels):
            put_f32(y + (row * pixels + p) * 4, get_f32(source + p * padded * 4))


def mean(args: Any, thread: Any, n_threads: Any) -> None:
    """Mean of all pixels of each image. Threads share the vectors of 16 channels.

    Slots: 0 x [images][pixels][padded], 1 y [images][padded], 2 images, 3 pixels, 4 padded.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    images = arg_int(args, 2)
    pixels = arg_int(args, 3)
    padded = arg_int(args, 4)
    apart = padded // 16
    vectors = images * apart
    v = vectors * thread // n_threads
    last = vectors * (thread + 1) // n_threads
    while v < last:
        image = v // apart
        source = x + (image * pixels * padded + v * 16 - image * padded) * 4
        if v + 4 <= smaller(last, (image + 1) * apart):
            four = zeros_f32(4)
            for p in range(pixels):
                four = four + load_f32(source + p * padded * 4, 4, 64)
            store_f32(y + v * 64, four / repeat(splat_f32(pixels), 4), 64)
            v += 4
        else:
            total = zeros_f32(1)
            for p in range(pixels):
                total = total + load_f32(source + p * padded * 4, 1, 0)
            store_f32(y + v * 64, total / splat_f32(pixels), 0)
            v += 1


def add(args: Any, thread: Any, n_threads: Any) -> None:
    """y = clamp(a + b), or of a alone. Threads share the vectors of 16.

    Slots: 0 a, 1 b (0: none), 2 y, 3 vectors, 4 least and 5 most value (float32).
    """
    a = arg_ptr(args, 0)
    b = arg_ptr(args, 1)
    adds = arg_int(args, 1) != 0
    y = arg_ptr(args, 2)
    vectors = arg_int(args, 3)
    least = splat_f32(arg_float(args, 4))
    most = splat_f32(arg_float(args, 5))
    for v in range(vectors * thread // n_threads, vectors * (thread + 1) // n_threads):
        total = load_f32(a + v * 64, 1, 0)
        if adds:
            total = total + load_f32(b + v * 64, 1, 0)
        # In this order what is no number stays none.
        store_f32(y + v * 64, minimum(most, maximum(total, least)), 0)


# Planes, and of their parts the first row, first column, rows and columns.
WINDOWS = (((1, 3, 7, 40), (2, 3, 4, 35)), ((2, 5, 6, 9), (0, 8, 6, 1)))


def _gather_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for images, channels, pixels, padded in ((1, 3, 35, 3), (2, 5, 7, 16), (1, 48, 1, 48)):
        x = rng.standard_normal((images, channels, pixels)).astype(np.float32)
        y = np.full((images, pixels, padded), np.nan, np.float32)
        expected = np.zeros_like(y)
        expected[..., :channels] = x.transpose(0, 2, 1)
        slots = [x, y, images, channels, 1, pixels, 0, pixels * 4, padded]
        yield Case(slots, [(y, expected)], 0, f"{images}x{channels}x{pixels}")
    for shape, (top, left, rows, columns) in WINDOWS:
        x = rng.standard_normal(shape).astype(np.float32)
        y = np.full((shape[0], rows, columns, 16), np.nan, np.float32)
        expected = np.zeros_like(y)
        part = x[:, :, top : top + rows, left : left + columns]
        expected[..., : shape[1]] = part.transpose(0, 2, 3, 1)
        sizes = [*shape[:2], rows, columns, x.strides[2], x.strides[1], 16]
        slots = [x[:, :, top:, left:], y, *sizes]
        yield Case(slots, [(y, expected)], 0, f"{rows}x{columns} of {shape}")


def _scatter_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for images, channels, pixels, padded in ((1, 3, 35, 16), (2, 5, 7, 16), (1, 48, 1, 48)):
        x = rng.standard_normal((images, pixels, padded)).astype(np.float32)
        y = np.full((images, channels, pixels), np.nan, np.float32)
        expected = np.ascontiguousarray(x[..., :channels].transpose(0, 2, 1))
        slots = [x, y, images, channels, pixels, padded]
        yield Case(slots, [(y, expected)], 0, f"{images}x{channels}x{pixels}")


def _mean_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for images, pixels, padded in ((1, 49, 48), (3, 1, 16), (2, 7, 112)):
        x = rng.standard_normal((images, pixels, padded)).astype(np.float32)
        y = np.full((images, padded), np.nan, np.float32)
        bound = np.abs(x).astype(np.float64).mean(1) * (pixels + 1) * 2.0**-24
        expected = x.astype(np.float64).mean(1).astype(np.float32)
        slots = [x, y, images, pixels, padded]
        yield Case(slots, [(y, expected)], bound, f"{images}x{pixels}x{padded}")


def _add_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for n, low, high, adds in ((16, -INFINITE, INFINITE, True), (112, 0.0, 6.0, True),
                               (48, -1.0, 1.0, False)):  # fmt: skip
        a = (rng.standard_normal(n) * 4).astype(np.float32)
        b = (rng.standard_normal(n) * 4).astype(np.float32)
        y = np.full(n, np.nan, np.float32)
        expected = np.clip(a + b if adds else a, np.float32(low), np.float32(high))
        slots = [a, b if adds else 0, y, n // 16, low, high]
        yield Case(slots, [(y, expected)], 0, f"{n}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows = (
        ("images_gather", gather, _gather_cases), ("images_scatter", scatter, _scatter_cases),
        ("images_mean", mean, _mean_cases), ("images_add", add, _add_cases),
    )  # fmt: skip
    return [
        Kernel(name, same_for_all(fn), (__name__,), cases, __name__) for name, fn, cases in rows
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
