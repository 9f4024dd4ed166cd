"""Images that lie pixel by pixel, to other places: beside others, with borders, or spread out.

Every image may be a part of the channels of another: bytes between its pixels are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.targets.simd import arg_int, arg_ptr, get_f32, load_f32, put_f32, store_f32
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def copy(args: Any, thread: Any, n_threads: Any) -> None:
    """Channels of each pixel to another place, and no byte beside them. Threads share the pixels.

    Slots: 0 x, 1 y, 2 pixels, 3 channels, 4 and 5 bytes between pixels of x and y.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    pixels = arg_int(args, 2)
    channels = arg_int(args, 3)
    x_step = arg_int(args, 4)
    y_step = arg_int(args, 5)
    whole = channels // 16 * 16
    for i in range(pixels * thread // n_threads, pixels * (thread + 1) // n_threads):
        p = x + i * x_step
        q = y + i * y_step
        for c in range(0, whole, 16):
            store_f32(q + c * 4, load_f32(p + c * 4, 1, 0), 0)
        for c in range(whole, channels):
            put_f32(q + c * 4, get_f32(p + c * 4))


def border(args: Any, thread: Any, n_threads: Any) -> None:
    """Images with zeros around them, and no pads of channels. Threads share the rows.

    Slots: 0 x, 1 y [images][rows][columns][channels], 2 images, 3 and 4 rows and columns of x, 5
    and 6 of y, 7 rows above and 8 columns to the left, 9 channels, 10 to 13 bytes between pixels,
    channels, images and rows of x, which may lie as in ONNX.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    height = arg_int(args, 3)
    width = arg_int(args, 4)
    out_height = arg_int(args, 5)
    out_width = arg_int(args, 6)
    left = arg_int(args, 8)
    channels = arg_int(args, 9)
    pixel = arg_int(args, 10)
    apart = arg_int(args, 11)
    rows = arg_int(args, 2) * out_height
    whole = channels // 16 * 16
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        image = row // out_height
        iy = row - image * out_height - arg_int(args, 7)
        to = y + row * out_width * channels * 4
        first = out_width
        count = 0
        if iy >= 0 and iy < height:
            first = left
            count = width
        for i in range(first * channels):
            put_f32(to + i * 4, 0.0)
        to = to + first * channels * 4
        p = x + (image * arg_int(args, 12) + iy * arg_int(args, 13))
        if apart == 4:
            for i in range(count):
                at = to + i * channels * 4
                for c in range(0, whole, 16):
                    store_f32(at + c * 4, load_f32(p + (i * pixel + c * 4), 1, 0), 0)
                for c in range(whole, channels):
                    put_f32(at + c * 4, get_f32(p + (i * pixel + c * 4)))
        else:
            for c in range(channels):
                q = p + c * apart
                for i in range(count):
                    put_f32(to + (i * channels + c) * 4, get_f32(q + i * pixel))
        to = to + count * channels * 4
        for i in range((out_width - first - count) * channels):
            put_f32(to + i * 4, 0.0)


def spread(args: Any, thread: Any, n_threads: Any) -> None:
    """Channels of a pixel to pixels of their own, below and beside each other. Threads share rows.

    Slots: 0 x [images][rows][columns][down][across][channels], 1 y, 2 images, 3 and 4 rows and
    columns of x, 5 and 6 pixels down and across for each of them, 7 channels, 8 and 9 bytes between
    pixels of x and y.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    rows = arg_int(args, 2) * arg_int(args, 3)
    width = arg_int(args, 4)
    down = arg_int(args, 5)
    across = arg_int(args, 6)
    channels = arg_int(args, 7)
    x_step = arg_int(args, 8)
    y_step = arg_int(args, 9)
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        for place in range(down * across):
            low = place // across
            q = y + ((row * down + low) * width * across + place - low * across) * y_step
            p = x + (row * width * x_step + place * channels * 4)
            for i in range(width):
                for c in range(channels):
                    put_f32(q + (i * across * y_step + c * 4), get_f32(p + (i * x_step + c * 4)))


# --- cases ----------------------------------------------------------------------------------------


def _copy_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for pixels, channels in ((7, 16), (5, 24), (3, 5), (1, 1)):
        x = rng.standard_normal((pixels, 48)).astype(np.float32)
        y = rng.standard_normal((pixels, 64)).astype(np.float32)
        expected = y.copy()
        expected[:, :channels] = x[:, :channels]
        yield Case([x, y, pixels, channels, 192, 256], [(y, expected)], 0, f"{pixels}x{channels}")


def _border_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    shapes = ((1, 16, (1, 1, 1, 1)), (2, 3, (0, 2, 1, 0)), (1, 37, (2, 0, 0, 1)))
    for images, channels, sides in shapes:
        x = rng.standard_normal((images, 4, 5, 48)).astype(np.float32)
        planes = np.ascontiguousarray(x[..., :channels].transpose(0, 3, 1, 2))
        top, left, bottom, right = sides
        expected = np.pad(x[..., :channels], ((0, 0), (top, bottom), (left, right), (0, 0)))
        within = np.pad(planes, ((0, 0), (0, 0), (1, 0), (2, 3)))
        sources = (
            (x, (192, 4, x[0].nbytes, 5 * 192)), (planes, (4, 80, planes[0].nbytes, 20)),
            (within[:, :, 1:, 2:], (4, *(within.strides[i] for i in (1, 0, 2)))),
        )  # fmt: skip
        for source, steps in sources:
            y = np.full(expected.shape, np.nan, np.float32)
            slots = [source, y, images, 4, 5, *expected.shape[1:3], top, left, channels, *steps]
            yield Case(slots, [(y, expected)], 0, f"{images}x{channels} {sides} {steps}")


def _spread_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for images, (down, across), channels in ((1, (2, 2), 1), (2, (3, 1), 5)):
        x = rng.standard_normal((images, 3, 5, 16)).astype(np.float32)
        y = np.full((images, 3 * down, 5 * across, channels), np.nan, np.float32)
        parts = x[..., : down * across * channels].reshape(images, 3, 5, down, across, channels)
        expected = np.ascontiguousarray(parts.transpose(0, 1, 3, 2, 4, 5)).reshape(y.shape)
        slots = [x, y, images, 3, 5, down, across, channels, 64, channels * 4]
        yield Case(slots, [(y, expected)], 0, f"{down}x{across}x{channels}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows = (
        ("images_copy", copy, _copy_cases), ("images_border", border, _border_cases),
        ("images_spread", spread, _spread_cases),
    )  # fmt: skip
    return [
        Kernel(name, same_for_all(fn), (__name__,), cases, __name__) for name, fn, cases in rows
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
