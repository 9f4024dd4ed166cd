"""Images of bytes: from and to numbers and other layouts.

Layout and rounding: `headrace.kernels.requantise`; planes: `headrace.kernels.images`. All that is
not a sum of products is computed as ONNX's operators between DequantizeLinear and QuantizeLinear
say, in float32, division included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.images import WINDOWS, in_planes
from headrace.kernels.requantise import (
    Quantised,
    dequantised,
    pixel_bytes,
    quantised,
    rounding_slots,
)
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    get_f32,
    get_u8,
    lane0,
    load_f32,
    load_u8_i32,
    maximum,
    minimum,
    put_f32,
    put_u8,
    round_i32,
    shl,
    splat_f32,
    splat_i32,
    stack_bytes,
    store_f32,
    store_i8,
    store_i32,
    store_words,
    to_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def bounded(x: Any, zero: Any, least: Any, most: Any) -> Any:
    """A vector rounded and moved by a zero point: int32."""
    low, high = to_f32(splat_i32(least - zero)), to_f32(splat_i32(most - zero))
    return round_i32(minimum(high, maximum(x, low))) + splat_i32(zero)


def code_of(x: Any, scale: Any, zero: Any, least: Any, most: Any) -> Any:
    """QuantizeLinear of a vector: int32."""
    return bounded(x / splat_f32(scale), zero, least, most)


def quantise(args: Any, thread: Any, n_threads: Any) -> None:
    """Some or all pixels of float32 planes to an image of bytes. Threads share the pixels.

    Slots: 0 x, 1 y, 2 to 7 `planes`, 8 bytes of a pixel of y, 9 scale, 10 zero point, 11 least,
    12 most.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    images = arg_int(args, 2)
    channels = arg_int(args, 3)
    rows = arg_int(args, 4)
    columns = arg_int(args, 5)
    row_bytes = arg_int(args, 6)
    plane = arg_int(args, 7)
    stride = arg_int(args, 8)
    scale = arg_float(args, 9)
    zero = arg_int(args, 10)
    least = arg_int(args, 11)
    most = arg_int(args, 12)
    chunks = (columns + 15) // 16
    units = images * rows * chunks
    for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
        row = u // chunks
        p = (u - row * chunks) * 16
        source = x + in_planes(row, p * 4, channels, rows, row_bytes, plane)
        to = y + (row * columns + p) * stride
        c = 0
        while c < channels:
            left = channels - c
            at = source + c * plane
            if p + 16 <= columns:
                word = code_of(load_f32(at, 1, 0), scale, zero, least, most)
                if left > 1:
                    code = code_of(load_f32(at + plane, 1, 0), scale, zero, least, most)
                    word = word | shl(code, 8)
                if left > 2:
                    code = code_of(load_f32(at + plane * 2, 1, 0), scale, zero, least, most)
                    word = word | shl(code, 16)
                if left > 3:
                    code = code_of(load_f32(at + plane * 3, 1, 0), scale, zero, least, most)
                    word = word | shl(code, 24)
                if stride == 4:
                    store_i32(to, word, 0)
                else:
                    store_words(to + c, word, 16, stride)
            else:
                for i in range(columns - p):
                    q = at + i * 4
                    word = code_of(splat_f32(get_f32(q)), scale, zero, least, most)
                    if left > 1:
                        code = splat_f32(get_f32(q + plane))
                        word = word | shl(code_of(code, scale, zero, least, most), 8)
                    if left > 2:
                        code = splat_f32(get_f32(q + plane * 2))
                        word = word | shl(code_of(code, scale, zero, least, most), 16)
                    if left > 3:
                        code = splat_f32(get_f32(q + plane * 3))
                        word = word | shl(code_of(code, scale, zero, least, most), 24)
                    store_words(to + (i * stride + c), word, 1, 4)
            c += 4


def dequantise(args: Any, thread: Any, n_threads: Any) -> None:
    """An image of bytes to float32, channel by channel. Threads share the channels.

    Slots: 0 x, 1 y [images][channels][pixels], 2 images, 3 channels, 4 pixels, 5 bytes of a pixel
    of x, 6 scale, 7 zero point.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    channels = arg_int(args, 3)
    pixels = arg_int(args, 4)
    stride = arg_int(args, 5)
    scale = arg_float(args, 6)
    zero = arg_int(args, 7)
    rows = arg_int(args, 2) * channels
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        image = row // channels
        source = x + (image * pixels * stride + row - image * channels)
        for p in range(pixels):
            value = to_f32(splat_i32(get_u8(source + p * stride) - zero)) * splat_f32(scale)
            put_f32(y + (row * pixels + p) * 4, lane0(value))


def gather(args: Any, thread: Any, n_threads: Any) -> None:
    """Some or all pixels of planes of bytes to an image. Threads share the pixels.

    Slots: 0 x, 1 y, 2 to 7 `planes`, 8 bytes of a pixel of y, 9 what is added (128 for int8,
    modulo 256).
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    channels = arg_int(args, 3)
    rows = arg_int(args, 4)
    columns = arg_int(args, 5)
    plane = arg_int(args, 7)
    stride = arg_int(args, 8)
    more = arg_int(args, 9)
    n = arg_int(args, 2) * rows * columns
    for p in range(n * thread // n_threads, n * (thread + 1) // n_threads):
        row = p // columns
        source = x + in_planes(row, p - row * columns, channels, rows, arg_int(args, 6), plane)
        for c in range(channels):
            put_u8(y + (p * stride + c), get_u8(source + c * plane) + more)


def scatter(args: Any, thread: Any, n_threads: Any) -> None:
    """An image to bytes, channel by channel. Threads share the channels.

    Slots: 0 x, 1 y [images][channels][pixels], 2 images, 3 channels, 4 pixels, 5 bytes of a pixel
    of x, 6 what is added (128 for int8, modulo 256).
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    channels = arg_int(args, 3)
    pixels = arg_int(args, 4)
    stride = arg_int(args, 5)
    more = arg_int(args, 6)
    rows = arg_int(args, 2) * channels
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        image = row // channels
        source = x + (image * pixels * stride + row - image * channels)
        for p in range(pixels):
            put_u8(y + (row * pixels + p), get_u8(source + p * stride) + more)


def to_floats(args: Any, thread: Any, n_threads: Any) -> None:
    """An image of bytes to one of float32, whose channels are padded to 16. Threads share pixels.

    Slots: 0 x, 1 y, 2 pixels of all images, 3 padded, 4 bytes of a pixel of x, 5 scale, 6 zero
    point.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    pixels = arg_int(args, 2)
    padded = arg_int(args, 3)
    stride = arg_int(args, 4)
    scale = splat_f32(arg_float(args, 5))
    zero = splat_i32(arg_int(args, 6))
    for p in range(pixels * thread // n_threads, pixels * (thread + 1) // n_threads):
        for v in range(padded // 16):
            code = load_u8_i32(x + (p * stride + v * 16), 1, 0)
            store_f32(y + (p * padded + v * 16) * 4, to_f32(code - zero) * scale, 0)


def from_floats(args: Any, thread: Any, n_threads: Any) -> None:
    """An image of float32, whose channels are padded to 16, to one of bytes. Threads share pixels.

    Slots: 0 x, 1 y, 2 pixels of all images, 3 padded, 4 bytes of a pixel of y, 5 scale, 6 zero
    point, 7 least, 8 most.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    pixels = arg_int(args, 2)
    padded = arg_int(args, 3)
    stride = arg_int(args, 4)
    scale = arg_float(args, 5)
    zero = arg_int(args, 6)
    least = arg_int(args, 7)
    most = arg_int(args, 8)
    few = stack_bytes(64)
    for p in range(pixels * thread // n_threads, pixels * (thread + 1) // n_threads):
        for v in range(padded // 16):
            value = load_f32(x + (p * padded + v * 16) * 4, 1, 0)
            code = code_of(value, scale, zero, least, most)
            if stride >= 16:
                store_i8(y + (p * stride + v * 16), code, 0)
            else:  # what is behind a pixel may be another thread's
                store_i8(few, code, 0)
                for i in range(stride):
                    put_u8(y + (p * stride + i), get_u8(few + i))


# --- cases ----------------------------------------------------------------------------------------

SHAPES = ((1, 3, 35), (2, 5, 7), (1, 48, 16), (2, 100, 19))  # images, channels, pixels
QUANTISED = (Quantised(0.02, 0), Quantised(0.031, 128, 9, 201), Quantised(0.007, 255))


def random_bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """With the least and the largest."""
    import numpy as np

    found = rng.integers(0, 256, shape, dtype=np.uint8)
    found.reshape(-1)[:2] = 0, 255
    return found


def _planes(image: np.ndarray, channels: int) -> np.ndarray:
    import numpy as np

    return np.ascontiguousarray(image[..., :channels].transpose(0, 2, 1))


def _quantise_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, channels, pixels) in enumerate(SHAPES):
        to = QUANTISED[i % 3]
        x = (rng.standard_normal((images, channels, pixels)) * 3).astype(np.float32)
        x[0, 0, :4] = 1e30, -1e30, np.float32(to.scale) * 2.5, np.float32(to.scale) * -3.5
        y = np.full((images, pixels, pixel_bytes(channels)), 77, np.uint8)
        expected = y.copy()
        # Words of four channels are written; what is beyond the last is zero then.
        expected[..., : -(-channels // 4) * 4] = 0
        expected[..., :channels] = quantised(x, to).transpose(0, 2, 1)
        slots = [
            x, y, images, channels, 1, pixels, 0, pixels * 4, y.shape[2], to.scale,
            *rounding_slots(to),
        ]  # fmt: skip
        yield Case(slots, [(y, expected)], 0, f"{images}x{channels}x{pixels}")
    for i, (shape, (top, left, rows, columns)) in enumerate(WINDOWS):
        to = QUANTISED[i]
        x = (rng.standard_normal(shape) * 3).astype(np.float32)
        part = np.ascontiguousarray(x[:, :, top : top + rows, left : left + columns])
        y = np.full((shape[0], rows * columns, pixel_bytes(shape[1])), 77, np.uint8)
        expected = y.copy()
        expected[..., : -(-shape[1] // 4) * 4] = 0
        whole = quantised(part.reshape(*shape[:2], -1), to)
        expected[..., : shape[1]] = whole.transpose(0, 2, 1)
        slots = [
            x[:, :, top:, left:], y, *shape[:2], rows, columns, x.strides[2], x.strides[1],
            y.shape[2], to.scale, *rounding_slots(to),
        ]  # fmt: skip
        yield Case(slots, [(y, expected)], 0, f"{rows}x{columns} of {shape}")


def _dequantise_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, channels, pixels) in enumerate(SHAPES):
        x = random_bytes(rng, images, pixels, pixel_bytes(channels))
        y = np.full((images, channels, pixels), np.nan, np.float32)
        expected = dequantised(_planes(x, channels), QUANTISED[i % 3])
        of = QUANTISED[i % 3]
        slots = [x, y, images, channels, pixels, x.shape[2], of.scale, of.zero]
        yield Case(slots, [(y, expected)], 0, f"{images}x{channels}x{pixels}")


def _gather_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, channels, pixels) in enumerate(SHAPES):
        x = random_bytes(rng, images, channels, pixels)
        y = np.full((images, pixels, pixel_bytes(channels)), 77, np.uint8)
        expected = y.copy()
        expected[..., :channels] = x.transpose(0, 2, 1) + np.uint8(i % 2 * 128)
        slots = [x, y, images, channels, 1, pixels, 0, pixels, y.shape[2], i % 2 * 128]
        yield Case(slots, [(y, expected)], 0, f"{images}x{channels}x{pixels}")
    for shape, (top, left, rows, columns) in WINDOWS:
        x, pixel = random_bytes(rng, *shape), pixel_bytes(shape[1])
        y = np.full((shape[0], rows, columns, pixel), 77, np.uint8)
        expected = y.copy()
        part = x[:, :, top : top + rows, left : left + columns]
        expected[..., : shape[1]] = part.transpose(0, 2, 3, 1)
        sizes = [*shape[:2], rows, columns, x.strides[2], x.strides[1], pixel]
        slots = [x[:, :, top:, left:], y, *sizes, 0]
        yield Case(slots, [(y, expected)], 0, f"{rows}x{columns} of {shape}")


def _scatter_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, channels, pixels) in enumerate(SHAPES):
        x = random_bytes(rng, images, pixels, pixel_bytes(channels))
        y = np.full((images, channels, pixels), 77, np.uint8)
        expected = _planes(x, channels) + np.uint8(i % 2 * 128)
        slots = [x, y, images, channels, pixels, x.shape[2], i % 2 * 128]
        yield Case(slots, [(y, expected)], 0, f"{images}x{channels}x{pixels}")


def _to_floats_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, channels, pixels) in enumerate(SHAPES[1:]):
        of, padded = QUANTISED[i], -(-channels // 16) * 16
        x = random_bytes(rng, images * pixels, pixel_bytes(channels))
        y = np.full((images * pixels, padded), np.nan, np.float32)
        slots = [x, y, len(y), padded, x.shape[1], of.scale, of.zero]
        yield Case(slots, [(y, dequantised(x[:, :padded], of))], 0, f"{len(y)}x{channels}")


def _from_floats_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (images, channels, pixels) in enumerate((*SHAPES[1:], (1, 3, 50), (2, 4, 9))):
        to, padded = QUANTISED[i % len(QUANTISED)], -(-channels // 16) * 16
        x = (rng.standard_normal((images * pixels, padded)) * 3).astype(np.float32)
        x[0, :4] = 1e30, -1e30, np.float32(to.scale) * 2.5, np.float32(to.scale) * -3.5
        y = np.full((len(x), pixel_bytes(channels)), 77, np.uint8)
        expected = y.copy()
        expected[:, :padded] = quantised(x, to)[:, : y.shape[1]]
        slots = [x, y, len(y), padded, y.shape[1], to.scale, *rounding_slots(to)]
        yield Case(slots, [(y, expected)], 0, f"{len(y)}x{channels}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows = (
        ("images_quantise", quantise, _quantise_cases),
        ("images_dequantise", dequantise, _dequantise_cases),
        ("images_gather_u8", gather, _gather_cases), ("images_scatter_u8", scatter, _scatter_cases),
        ("images_to_floats", to_floats, _to_floats_cases),
        ("images_from_floats", from_floats, _from_floats_cases),
    )  # fmt: skip
    sources = (__name__, "headrace.kernels.images", "headrace.kernels.requantise")
    return [Kernel(name, same_for_all(fn), sources, cases, __name__) for name, fn, cases in rows]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
