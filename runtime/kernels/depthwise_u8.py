"""Depthwise convolutions of images of bytes, with int8 weights that have a scale for each channel.

Layout and rounding: `headrace.kernels.requantise`; zero points and signs as in
`headrace.kernels.convolution_u8`. Four neighbouring pixels of a row are interleaved byte by byte,
so that one instruction multiplies four taps of a channel. Some pixels that are written come from
the same ones that are read, each with its weights in its own places and zeros elsewhere: any
stride and dilation is another placing of weights.

64 channels at a time; the last 64 are those at the end, so that some may be computed twice. Of
fewer than 64, what is loaded of the next pixel has no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.convolution_u8 import SHAPES, random_weights
from headrace.kernels.geometry import Geometry, geometry_of, reference
from headrace.kernels.requantise import (
    GROUP,
    Quantised,
    byte_order,
    folded_bias,
    pixel_bytes,
    requantised,
    rounding_slots,
    scales,
)
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    dot4_each,
    interleave4,
    join4,
    larger,
    load_f32,
    load_i32,
    load_u8,
    part,
    repeat,
    smaller,
    splat_i32,
    store_u8,
    store_u8_quarter,
    to_bytes,
    to_f32,
    xor_u8,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

FOUR = 4  # pixels that are interleaved
TAIL = 768  # bytes for 64 channels: bias, scales, 128 * sums of weights
AT_ONCE = (1, 2, 4)  # pixels that are written together


def _depthwise(target: Target) -> KernelFunction:
    """y = requantised(bias + sum over taps of w x), channel by channel.

    Slots: 0 weights (`placed_weights`), 1 x, 2 y, 3 tails (`tails`), 4 a pixel of zero points,
    5 channels (with pads), 6 pixels at once, 7 most, 8 to 22 geometry (taps
    and dilations across do not count), 23 zero point, 24 least, 25 fours of pixels in a row of
    taps. Threads share rows and channels.
    """
    signed = target.dot_bias(8) == 0

    def store(p: Any, code: Any, narrow: Any) -> None:
        if narrow == 0:
            store_u8(p, code)
        else:  # there is another pixel behind the channels
            store_u8_quarter(p, code, 0)
            if narrow > 16:
                store_u8_quarter(p + 16, code, 1)
            if narrow > 32:
                store_u8_quarter(p + 32, code, 2)

    def of(count: int) -> Any:
        vectors = 4 * count

        def some(
            w: Any, x: Any, y: Any, tail: Any, outside: Any, fours: Any, tall: Any, top: Any,
            left: Any, apart_y: Any, height: Any, width: Any, pixel: Any, y_step: Any, valid: Any,
            zero: Any, least: Any, most: Any, narrow: Any,
        ) -> None:  # fmt: skip
            start = load_i32(tail, 4, 64)
            if signed:
                start = start + load_i32(tail + 512, 4, 64)
            acc = repeat(start, count)
            q = w
            for ky in range(tall):
                iy = top + ky * apart_y
                if iy >= 0 and iy < height:
                    row = x + iy * width * pixel
                    for g in range(fours):
                        ix = left + g * 4
                        p0 = row + ix * pixel
                        p1 = p0 + pixel
                        p2 = p1 + pixel
                        p3 = p2 + pixel
                        if ix < 0 or ix + 4 > width:
                            if ix < 0 or ix >= width:
                                p0 = outside
                            if ix < -1 or ix >= width - 1:
                                p1 = outside
                            if ix < -2 or ix >= width - 2:
                                p2 = outside
                            if ix < -3 or ix >= width - 3:
                                p3 = outside
                        four = interleave4(
                            join4(
                                load_u8(p0, 1, 0), load_u8(p1, 1, 0), load_u8(p2, 1, 0),
                                load_u8(p3, 1, 0),
                            )
                        )  # fmt: skip
                        codes = repeat(xor_u8(four, 0x80), count)
                        acc = dot4_each(acc, codes, load_u8(q, vectors, 64))
                        q = q + count * 256
                else:
                    same = load_u8(outside, 1, 0)
                    codes = repeat(xor_u8(interleave4(join4(same, same, same, same)), 0x80), count)
                    for _ in range(fours):
                        acc = dot4_each(acc, codes, load_u8(q, vectors, 64))
                        q = q + count * 256
            found = to_f32(acc) * repeat(load_f32(tail + 256, 4, 64), count)
            code = to_bytes(found, splat_i32(zero), splat_i32(least), splat_i32(most))
            store(y, part(code, 0), narrow)
            if count > 1:  # noqa: SIM102 - known when it is compiled, what is inside is not
                if valid > 1:
                    store(y + y_step, part(code, 1), narrow)
            if count > 2:
                if valid > 2:
                    store(y + 2 * y_step, part(code, 2), narrow)
                if valid > 3:
                    store(y + 3 * y_step, part(code, 3), narrow)

        return some

    one, two, four = (of(count) for count in AT_ONCE)

    def depthwise_u8(args: Any, thread: Any, n_threads: Any) -> None:
        (
            images, height, width, out_height, out_width, tall, _, step_y, step_x, above, before,
            apart_y, _, pixel, out_pixel,
        ) = geometry_of(args)  # fmt: skip
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        tail = arg_ptr(args, 3)
        outside = arg_ptr(args, 4)
        channels = arg_int(args, 5)
        count = arg_int(args, 6)
        most = arg_int(args, 7)
        zero = arg_int(args, 23)
        least = arg_int(args, 24)
        fours = arg_int(args, 25)
        narrow = 0
        if channels < 64:
            narrow = channels
        blocks = (channels + 63) // 64
        units = images * out_height * blocks
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            row = u // blocks
            block = u - row * blocks
            c = larger(0, smaller(block * 64, channels - 64))
            image = row // out_height
            top = (row - image * out_height) * step_y - above
            source = x + (image * height * width * pixel + c)
            at = w + block * (tall * fours * count * 256)
            end = tail + block * TAIL
            ox = 0
            while ox < out_width:
                left = ox * step_x - before
                to = y + ((row * out_width + ox) * out_pixel + c)
                valid = smaller(count, out_width - ox)
                if count == 4:
                    four(
                        at, source, to, end, outside + c, fours, tall, top, left, apart_y, height,
                        width, pixel, out_pixel, valid, zero, least, most, narrow,
                    )  # fmt: skip
                elif count == 2:
                    two(
                        at, source, to, end, outside + c, fours, tall, top, left, apart_y, height,
                        width, pixel, out_pixel, valid, zero, least, most, narrow,
                    )  # fmt: skip
                else:
                    one(
                        at, source, to, end, outside + c, fours, tall, top, left, apart_y, height,
                        width, pixel, out_pixel, valid, zero, least, most, narrow,
                    )  # fmt: skip
                ox += count

    return depthwise_u8


# --- references and cases -------------------------------------------------------------------------


def placing(wide: int, stride: int) -> tuple[int, int]:
    """Pixels that are written at once, and fours that are read, for taps so many pixels wide.

    Of each four there are 8 shuffles, and 4 products for each pixel that is written.
    """

    def fours(count: int) -> int:
        return -(-(stride * (count - 1) + wide) // FOUR)

    count = min(AT_ONCE, key=lambda n: (fours(n) * (8 + 4 * n) / n, n))
    return count, fours(count)


def reach(geometry: Geometry) -> int:
    """Pixels from the first to the last tap of a row."""
    return (geometry.taps[1] - 1) * geometry.dilations[1] + 1


def blocks_of(channels: int) -> np.ndarray:
    """The channels of each 64, as the lanes of 4 vectors hold them: [blocks, 4, 16]."""
    import numpy as np

    n_blocks = -(-channels // GROUP)
    starts = np.maximum(0, np.minimum(np.arange(n_blocks) * GROUP, channels - GROUP))
    found: np.ndarray = starts[:, None, None] + byte_order(4)
    return found


def placed_weights(w: np.ndarray, channels: int, geometry: Geometry) -> np.ndarray:
    """int8 weights [down, across, channels] as `_depthwise` reads them.

    [64 channels][tap down][four][pixel written][vector][16 channels][4 pixels].
    """
    import numpy as np

    stride, apart = geometry.strides[1], geometry.dilations[1]
    count, fours = placing(reach(geometry), stride)
    channels = max(GROUP, channels)
    padded = np.zeros((*w.shape[:2], channels), np.int8)
    padded[..., : w.shape[2]] = w
    places = np.zeros((channels, w.shape[0], count, fours * FOUR), np.int8)
    for n in range(count):
        for kx in range(w.shape[1]):
            places[:, :, n, n * stride + kx * apart] = padded[:, kx].T
    rows = places[blocks_of(channels)]  # [block][vector][lane][down][written][pixel]
    split = rows.reshape(*rows.shape[:5], fours, FOUR)
    return np.ascontiguousarray(split.transpose(0, 3, 5, 4, 1, 2, 6))


def tails(bias: np.ndarray, scale: np.ndarray, sums: np.ndarray, channels: int) -> np.ndarray:
    """Of each 64 channels: bias (`folded_bias`), scales and 128 * sums; int32 [blocks, 3, 64]."""
    import numpy as np

    channels = max(GROUP, channels)
    padded = np.zeros((3, channels), np.int32)
    padded[0, : len(bias)] = bias
    padded[1, : len(bias)] = scale.astype(np.float32).view(np.int32)
    padded[2, : len(bias)] = 128 * sums.astype(np.int64)
    rows = padded[:, blocks_of(channels)]
    return np.ascontiguousarray(rows.transpose(1, 0, 2, 3).reshape(-1, 3, GROUP))


_CASES = (
    *((geometry, written) for geometry, _, written in SHAPES),
    (Geometry(1, (7, 14), (7, 14), (5, 5), pads=(2, 2)), 80),
    (Geometry(2, (8, 15), (4, 8), (5, 5), (2, 2), (1, 2)), 64),
)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, written) in enumerate(_CASES):
        of = Quantised(0.02, (0, 128, 255)[i % 3])
        to = Quantised(0.03, (128, 0, 3)[i % 3], *((0, 255) if i % 2 else (7, 200)))
        channels = pixel_bytes(written)
        pixels = geometry.images * geometry.read[0] * geometry.read[1]
        memory = rng.integers(0, 256, pixels * channels + GROUP, dtype=np.uint8)
        x = memory[:-GROUP].reshape(geometry.images, *geometry.read, channels)
        x[0, 0, 0], x[0, -1, -1] = 255, 0
        w, scale = random_weights(rng, (*geometry.taps, channels), 100)
        bias = rng.integers(-(2**12), 2**12, channels).astype(np.int32)
        scale = scales(of, (scale * 0.03 / 0.02).astype(np.float32), to.scale)
        sums = w.astype(np.int64).sum((0, 1))
        exact = reference(x.astype(np.float64) - of.zero, w, geometry, depthwise=True) + bias
        y = np.full((geometry.images, *geometry.written, channels), 99, np.uint8)
        zero, least, most = rounding_slots(to)
        count, fours = placing(reach(geometry), geometry.strides[1])
        slots = [
            placed_weights(w, channels, geometry), memory, y,
            tails(folded_bias(bias, sums, of.zero), scale, sums, channels),
            np.full(channels + GROUP, of.zero, np.uint8), channels, count, most,
            *geometry.slots(channels, channels), zero, least, fours,
        ]  # fmt: skip
        expected = requantised(exact, scale, to)
        yield Case(slots, [(y, expected)], 0, f"{geometry}, {channels}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.requantise", "headrace.kernels.geometry")
    return [Kernel("depthwise_u8", _depthwise, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
