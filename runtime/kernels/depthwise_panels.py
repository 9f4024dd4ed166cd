"""Depthwise convolutions of images that lie in panels of 64 pixels, as sparse products make them.

Channel by channel (Elsen et al., "Fast Sparse ConvNets", 1911.09723): a channel's pixels are laid
out row by row with zeros where taps fall outside, so that a tap is the same distance for all of
them. With strides of 2, even and odd rows and columns lie apart, and the distances are as simple.
Where rows of outputs are longer than their pixels, what is computed between them is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.kernels.convolution import INFINITE, Geometry, reference
from headrace.kernels.sparse_product import PANEL, to_panels
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bcast_f32,
    evens,
    fma,
    get_i32,
    iota_i32,
    load_f32,
    maximum,
    minimum,
    odds,
    part,
    repeat,
    select_lt,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

_VECTOR = 64
_CHANNEL = PANEL * _VECTOR


@dataclass(frozen=True)
class Planes:
    """How a channel lies while it is computed; sizes in float32.

    Attributes:
        row: between rows.
        plane: of one of the stride x stride parts.
        steps: from an output to each of its taps, in bytes.
        scratch: of a thread, in bytes.
    """

    row: int
    plane: int
    steps: tuple[int, ...]
    scratch: int


def planes(geometry: Geometry) -> Planes | None:
    """Of a convolution of one image; None: it is none that the kernel does."""
    (height, width), (rows, columns) = geometry.read, geometry.written
    stride = geometry.strides[0]
    if geometry.images != 1 or geometry.strides not in ((1, 1), (2, 2)):
        return None
    above, before = geometry.pads
    dy, dx = geometry.dilations
    reach_y, reach_x = (geometry.taps[0] - 1) * dy, (geometry.taps[1] - 1) * dx
    # Behind a row come the zeros in front of the next: they are the same.
    row = -(-(width + before) // stride)
    row = max(row, columns + reach_x // stride - before // stride)
    n_rows = max(-(-(height + above) // stride), rows + reach_y // stride)
    plane = -(-(n_rows * row + reach_x + 160) // 16) * 16
    steps = []
    for ky in range(geometry.taps[0]):
        for kx in range(geometry.taps[1]):
            y, x = ky * dy, kx * dx
            part_ = y % stride * stride + x % stride
            steps.append(4 * (part_ * plane + y // stride * row + x // stride))
    flat = -(-(height * width + before + 64) // 16) * 16
    made = -(-(rows * row + 160) // 16) * 16
    out = -(-(rows * columns + 64) // 16) * 16
    total = 16 + flat + stride * stride * plane + made + out
    return Planes(row, plane, tuple(steps), 4 * total)


def _depthwise(target: Target) -> KernelFunction:
    """y = clamp(bias + sum over taps of w x), channel by channel, of one image.

    Slots: 0 weights [tap][padded channels] float32, 1 x, 2 y, 3 bias, 4 steps to the taps (int32),
    5 channels, 6 padded channels (to 16), 7 least and 8 most value (float32), 9 and 10 rows and
    columns that are read, 11 and 12 that are written, 13 taps, 14 stride, 15 and 16 pads above and
    to the left, 17 float32 between rows, 18 of a plane, 19 scratch, 20 its bytes for each thread.
    Threads share the channels.
    """
    most = 8 if target.vector_bytes >= 64 else 2

    def of(count: int) -> Any:
        def some(
            w: Any, w_step: Any, p: Any, steps: Any, taps: Any, bias: Any, least: Any,
            highest: Any, to: Any,
        ) -> None:  # fmt: skip
            acc = repeat(bcast_f32(bias, 1, 0), count)
            for t in range(taps):
                acc = fma(
                    load_f32(p + get_i32(steps + t * 4), count, _VECTOR),
                    repeat(bcast_f32(w + t * w_step, 1, 0), count), acc,
                )  # fmt: skip
            low, high = repeat(splat_f32(least), count), repeat(splat_f32(highest), count)
            store_f32(to, minimum(high, maximum(acc, low)), _VECTOR)

        return some

    many, one = of(most), of(1)

    def valid(source: Any, column: Any, before: Any, past: Any) -> Any:
        """16 columns of a row, zeros where there is none; columns count from the pad's begin."""
        there = iota_i32() + splat_i32(column)
        value = select_lt(there, splat_i32(past), load_f32(source, 1, 0), splat_f32(0.0))
        return select_lt(there, splat_i32(before), splat_f32(0.0), value)

    def depthwise(args: Any, thread: Any, n_threads: Any) -> None:
        channels = arg_int(args, 5)
        padded = arg_int(args, 6)
        least = arg_float(args, 7)
        highest = arg_float(args, 8)
        height = arg_int(args, 9)
        width = arg_int(args, 10)
        rows = arg_int(args, 11)
        columns = arg_int(args, 12)
        taps = arg_int(args, 13)
        stride = arg_int(args, 14)
        above = arg_int(args, 15)
        before = arg_int(args, 16)
        row_step = arg_int(args, 17) * 4
        plane = arg_int(args, 18) * 4
        scratch = arg_ptr(args, 19) + arg_int(args, 20) * thread
        flat = scratch + _VECTOR
        parts = flat + (height * width + before + 64 + 15) // 16 * _VECTOR
        made = parts + stride * stride * plane
        out = made + (rows * (row_step // 4) + 160 + 15) // 16 * _VECTOR
        vectors = (height * width + 15) // 16
        out_vectors = (rows * columns + 15) // 16
        places = ((rows - 1) * (row_step // 4) + columns + 15) // 16
        for v in range(stride * stride * plane // _VECTOR):
            store_f32(parts + v * _VECTOR, zeros_f32(1), 0)
        for c in range(channels * thread // n_threads, channels * (thread + 1) // n_threads):
            x = arg_ptr(args, 1) + c * _CHANNEL
            y = arg_ptr(args, 2) + c * _CHANNEL
            for v in range(vectors):
                k = v // PANEL
                at = k * padded * _CHANNEL + (v - k * PANEL) * _VECTOR
                store_f32(flat + v * _VECTOR, load_f32(x + at, 1, 0), 0)
            for r in range(height):
                source = flat + (r * width - before) * 4
                line = r + above
                if stride == 1:
                    to = parts + line * row_step
                    for column in range(0, before + width, 16):
                        value = valid(source + column * 4, column, before, before + width)
                        store_f32(to + column * 4, value, 0)
                else:
                    to = parts + (line % 2 * 2 * plane + line // 2 * row_step)
                    for column in range(0, before + width, 32):
                        a = valid(source + column * 4, column, before, before + width)
                        b = valid(source + column * 4 + 64, column + 16, before, before + width)
                        store_f32(to + column * 2, evens(a, b), 0)
                        store_f32(to + (plane + column * 2), odds(a, b), 0)
            w = arg_ptr(args, 0) + c * 4
            bias = arg_ptr(args, 3) + c * 4
            steps = arg_ptr(args, 4)
            v = places * 0
            while v < places:
                if places - v >= most:
                    many(
                        w, padded * 4, parts + v * _VECTOR, steps, taps, bias, least, highest,
                        made + v * _VECTOR,
                    )  # fmt: skip
                    v += most
                else:
                    one(
                        w, padded * 4, parts + v * _VECTOR, steps, taps, bias, least, highest,
                        made + v * _VECTOR,
                    )  # fmt: skip
                    v += 1
            for r in range(rows):
                for column in range(0, columns, 16):
                    value = load_f32(made + r * row_step + column * 4, 1, 0)
                    store_f32(out + (r * columns + column) * 4, value, 0)
            store_f32(out + rows * columns * 4, zeros_f32(1), 0)
            for v in range(out_vectors):
                k = v // PANEL
                at = k * padded * _CHANNEL + (v - k * PANEL) * _VECTOR
                store_f32(y + at, load_f32(out + v * _VECTOR, 1, 0), 0)

    return depthwise


# --- cases ----------------------------------------------------------------------------------------

_SHAPES: tuple[tuple[Geometry, int], ...] = (
    (Geometry(1, (14, 14), (14, 14), (5, 5), pads=(2, 2)), 5),
    (Geometry(1, (9, 33), (5, 17), (3, 3), (2, 2), (1, 1)), 16),
    (Geometry(1, (14, 10), (7, 5), (5, 5), (2, 2), (1, 1)), 3),
    (Geometry(1, (7, 9), (3, 5), (5, 5), (1, 1), (0, 0)), 2),
    (Geometry(1, (9, 21), (9, 21), (3, 3), pads=(2, 2), dilations=(2, 2)), 2),
    (Geometry(1, (3, 2), (3, 2), (3, 3), pads=(1, 1)), 4),
)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, channels) in enumerate(_SHAPES):
        padded = -(-channels // 16) * 16
        x = np.zeros((1, *geometry.read, padded), np.float32)
        x[..., :channels] = rng.standard_normal((*x.shape[:3], channels))
        w = np.zeros((*geometry.taps, padded), np.float32)
        w[..., :channels] = rng.standard_normal((*geometry.taps, channels))
        bias = rng.standard_normal(padded).astype(np.float32)
        low, high = (-INFINITE, INFINITE) if i < 2 else (0.0, 6.0)
        of = planes(geometry)
        assert of is not None
        exact = reference(x, w, geometry, depthwise=True)
        size = reference(np.abs(x), np.abs(w), geometry, depthwise=True)
        terms = geometry.taps[0] * geometry.taps[1] + 2
        bound = to_panels(((size + np.abs(bias)) * terms * 2.0**-24 + 1e-30).reshape(-1, padded))
        expected = np.clip(exact + bias, low, high).astype(np.float32).reshape(-1, padded)
        wanted = to_panels(expected)
        y = np.zeros_like(wanted)
        # What lies behind the last channel and the last pixel is nobody's.
        there = to_panels(np.broadcast_to(np.arange(padded) < channels, expected.shape))
        bound = np.where(there, bound, np.inf)
        slots = [
            w, to_panels(x.reshape(-1, padded)), y, bias, np.array(of.steps, np.int32), channels,
            padded, low, high, *geometry.read, *geometry.written, len(of.steps),
            geometry.strides[0], *geometry.pads, of.row, of.plane,
            np.zeros(8 * of.scratch, np.uint8), of.scratch,
        ]  # fmt: skip
        yield Case(slots, [(y, wanted)], bound, f"{geometry}, {channels}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.sparse_product")
    return [Kernel("depthwise_panels_f32", _depthwise, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
