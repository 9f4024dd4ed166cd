"""Convolutions of float32 images that lie pixel by pixel, channels innermost ("NHWC").

Rows of channels that are written are padded to a multiple of 16; pads get what bias and weights of
absent channels give, which whoever makes those leaves zero. No image is copied or padded: taps that
fall outside are left out, pixel by pixel at the borders.

Geometry (the slots from `GEOMETRY` on): 0 images, 1 and 2 rows and columns of what is read, 3 and 4
of what is written, 5 and 6 of taps, 7 and 8 strides, 9 and 10 pads above and to the left, 11 and 12
dilations, 13 bytes of a pixel that is read, 14 of one that is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.sparse.format import TILE_ROWS
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bcast_f32,
    by_token,
    fma,
    fma_outer,
    larger,
    load_f32,
    load_f32_grid,
    maximum,
    minimum,
    outer,
    prefetch,
    repeat,
    smaller,
    splat_f32,
    store_f32_grid,
    strip,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

GEOMETRY = 8
FEW = 4  # pixels at a time where there are not enough for more
INFINITE = float("inf")  # a bound that bounds nothing


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution, in pixels; pads are those above and to the left."""

    images: int
    read: tuple[int, int]
    written: tuple[int, int]
    taps: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)

    def flat(self) -> Geometry:
        """The same where each pixel stands for itself, as one row, which needs no borders."""
        alone = self.taps == self.strides == (1, 1) and self.pads == (0, 0)
        if not alone or self.read != self.written:
            return self
        count = self.images * self.read[0] * self.read[1]
        return Geometry(1, (1, count), (1, count), (1, 1))

    def slots(self, read_bytes: int, written_bytes: int) -> list[int]:
        """Of an argument block; bytes are of pixels."""
        return [
            self.images, *self.read, *self.written, *self.taps, *self.strides, *self.pads,
            *self.dilations, read_bytes, written_bytes,
        ]  # fmt: skip


def pixels_at_once(target: Target) -> int:
    """Pixels whose sums a convolution has in registers, for each of `gemm_tiles` tiles."""
    return 8 if target.gemm_tiles > 1 else target.tokens("f32")


def _first(begin: Any, step: Any) -> Any:
    """The first tap that does not fall in front of the image, which begins at -`begin`."""
    found = begin * 0
    if begin < 0:
        found = (step - 1 - begin) // step
    return found


def _behind(begin: Any, step: Any, taps: Any, size: Any) -> Any:
    """The first tap that falls behind the image."""
    return smaller(taps, larger(begin * 0, (size - begin + step - 1) // step))


def _dense(target: Target) -> KernelFunction:
    """y = clamp(bias + sum over taps and channels of w x, or with what is there added to it).

    Slots: 0 weights (tiles of 16 channels that are written: [tap][channel read][16] float32),
    1 x, 2 y, 3 bias (16 a tile), 4 what is added before clamping (0: nothing; it lies as y does),
    5 channels read, 6 tiles, 7 least and 23 most value (float32), 8 to 22 geometry.
    Threads share the pixels, or, where these are few, the tiles.
    """
    tiles, most = target.gemm_tiles, pixels_at_once(target)
    lanes = target.lanes("f32")
    strips = TILE_ROWS // lanes

    def of(count: int, lines: int = 0) -> Any:
        def some(
            w: Any, x: Any, y: Any, bias: Any, more: Any, channels: Any, ny: Any, nx: Any,
            row_step: Any, tap_step: Any, w_row: Any, tile_stride: Any, x_step: Any, y_step: Any,
            least: Any, highest: Any, adds: Any, rows: Any, ahead: Any,
        ) -> None:  # fmt: skip
            acc = outer(load_f32(bias, rows, 64), repeat(splat_f32(1.0), count))
            for ky in range(ny):
                for kx in range(nx):
                    p = x + (ky * row_step + kx * tap_step)
                    q = w + (ky * w_row + kx * channels * 64)
                    left = channels
                    while left >= 4:  # addresses of pixels are formed once for four channels
                        if lines > 0:
                            prefetch(ahead)
                            if lines > 1:
                                prefetch(ahead + 64)
                                prefetch(ahead + 128)
                                prefetch(ahead + 192)
                            ahead = ahead + lines * 64
                        acc = fma_outer(
                            load_f32(q, rows, tile_stride),
                            bcast_f32(p, count, x_step), acc,
                        )  # fmt: skip
                        acc = fma_outer(
                            load_f32(q + 64, rows, tile_stride),
                            bcast_f32(p + 4, count, x_step), acc,
                        )  # fmt: skip
                        acc = fma_outer(
                            load_f32(q + 128, rows, tile_stride),
                            bcast_f32(p + 8, count, x_step), acc,
                        )  # fmt: skip
                        acc = fma_outer(
                            load_f32(q + 192, rows, tile_stride),
                            bcast_f32(p + 12, count, x_step), acc,
                        )  # fmt: skip
                        p = p + 16
                        q = q + 256
                        left -= 4
                    while left > 0:
                        acc = fma_outer(
                            load_f32(q, rows, tile_stride), bcast_f32(p, count, x_step), acc
                        )
                        p = p + 4
                        q = q + 64
                        left -= 1
            found = by_token(acc)
            if adds:
                found = found + load_f32_grid(more, rows, count, 64, y_step)
            low = repeat(repeat(splat_f32(least), rows), count)
            high = repeat(repeat(splat_f32(highest), rows), count)
            store_f32_grid(y, minimum(high, maximum(found, low)), count, 64, y_step)

        return some

    # While it multiplies, other weights come from memory: 1 or 4 lines for 4 channels.
    many, slowly, fast = of(most), of(most, 1), of(most, 4)
    few, one = of(FEW), of(1)

    def dense(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        bias = arg_ptr(args, 3)
        adds = arg_int(args, 4) != 0
        more = arg_ptr(args, 4)
        channels = arg_int(args, 5)
        n_tiles = arg_int(args, 6)
        least = arg_float(args, 7)
        highest = arg_float(args, 23)
        height = arg_int(args, 9)
        width = arg_int(args, 10)
        out_height = arg_int(args, 11)
        out_width = arg_int(args, 12)
        tall = arg_int(args, 13)
        wide = arg_int(args, 14)
        step_y = arg_int(args, 15)
        step_x = arg_int(args, 16)
        above = arg_int(args, 17)
        before = arg_int(args, 18)
        apart_y = arg_int(args, 19)
        apart_x = arg_int(args, 20)
        pixel = arg_int(args, 21)
        out_pixel = arg_int(args, 22)
        per_row = (out_width + most - 1) // most
        units = arg_int(args, 8) * out_height * per_row
        w_row = wide * channels * 64
        tile_stride = tall * w_row
        first = units * thread // n_threads
        last = units * (thread + 1) // n_threads
        t = n_tiles * 0
        end = n_tiles
        if units < 4 * n_threads:
            first = units * 0
            last = units
            t = n_tiles * thread // n_threads // tiles * tiles
            if thread + 1 < n_threads:
                end = n_tiles * (thread + 1) // n_threads // tiles * tiles
        # While it multiplies by some tiles, the next come from memory: in at least 2 rounds.
        reach = tall * w_row // 4
        row_step = apart_y * width * pixel
        tap_step = apart_x * pixel
        rounds = smaller(last - first, 8)
        while t < end:
            at_once = t * 0 + 1
            if tiles > 1 and t + tiles <= end:
                at_once = at_once * 0 + tiles
            for s in range(strips):
                tile = strip(w + t * tile_stride, s)
                column = t * 64 + s * lanes * 4
                row = first // per_row
                place = first - row * per_row
                fresh = row * 0 - 1  # the row whose borders are known
                ky = row * 0
                ny = row * 0
                source = x
                for u in range(first, last):
                    ahead = w + (t + at_once) * tile_stride
                    lines = t * 0
                    if s == 0 and t + 2 * at_once <= end and u - first < rounds:
                        lines = lines + (1 if rounds == 8 else 4)
                        ahead = ahead + (u - first) * lines * reach
                    if row != fresh:
                        fresh = row
                        image = row // out_height
                        iy = (row - image * out_height) * step_y - above
                        ky = _first(iy, apart_y)
                        ny = _behind(iy, apart_y, tall, height) - ky
                        source = x + ((image * height + iy + ky * apart_y) * width * pixel)
                    left_end = place * most
                    stop = smaller(left_end + most, out_width)
                    ox = left_end
                    while ox < stop:
                        ix = ox * step_x - before
                        reached = ix + (wide - 1) * apart_x  # by the last tap
                        n = ox * 0 + 1
                        kx = ox * 0
                        nx = wide
                        if ix >= 0 and reached < width:
                            if stop - ox == most and reached + (most - 1) * step_x < width:
                                n = n * 0 + most
                            elif stop - ox >= FEW and reached + (FEW - 1) * step_x < width:
                                n = n * 0 + FEW
                        else:
                            kx = _first(ix, apart_x)
                            nx = _behind(ix, apart_x, wide, width) - kx
                        at = w_row * ky + kx * channels * 64
                        to = (row * out_width + ox) * out_pixel + column
                        p = source + (ix + kx * apart_x) * pixel
                        if tiles > 1 and at_once == tiles:
                            if n == most and lines == 0:
                                many(
                                    tile + at, p, y + to, bias + column, more + to, channels, ny,
                                    nx, row_step, tap_step, w_row, tile_stride, step_x * pixel,
                                    out_pixel, least, highest, adds, tiles, ahead,
                                )  # fmt: skip
                            elif n == most and lines == 1:
                                slowly(
                                    tile + at, p, y + to, bias + column, more + to, channels, ny,
                                    nx, row_step, tap_step, w_row, tile_stride, step_x * pixel,
                                    out_pixel, least, highest, adds, tiles, ahead,
                                )  # fmt: skip
                            elif n == most:
                                fast(
                                    tile + at, p, y + to, bias + column, more + to, channels, ny,
                                    nx, row_step, tap_step, w_row, tile_stride, step_x * pixel,
                                    out_pixel, least, highest, adds, tiles, ahead,
                                )  # fmt: skip
                            elif n == FEW:
                                few(
                                    tile + at, p, y + to, bias + column, more + to, channels, ny,
                                    nx, row_step, tap_step, w_row, tile_stride, step_x * pixel,
                                    out_pixel, least, highest, adds, tiles, ahead,
                                )  # fmt: skip
                            else:
                                one(
                                    tile + at, p, y + to, bias + column, more + to, channels, ny,
                                    nx, row_step, tap_step, w_row, tile_stride, step_x * pixel,
                                    out_pixel, least, highest, adds, tiles, ahead,
                                )  # fmt: skip
                        elif n == most:
                            many(
                                tile + at, p, y + to, bias + column, more + to, channels, ny, nx,
                                row_step, tap_step, w_row, tile_stride, step_x * pixel, out_pixel,
                                least, highest, adds, 1, ahead,
                            )  # fmt: skip
                        elif n == FEW:
                            few(
                                tile + at, p, y + to, bias + column, more + to, channels, ny, nx,
                                row_step, tap_step, w_row, tile_stride, step_x * pixel, out_pixel,
                                least, highest, adds, 1, ahead,
                            )  # fmt: skip
                        else:
                            one(
                                tile + at, p, y + to, bias + column, more + to, channels, ny, nx,
                                row_step, tap_step, w_row, tile_stride, step_x * pixel, out_pixel,
                                least, highest, adds, 1, ahead,
                            )  # fmt: skip
                        ox += n
                    place += 1
                    if place == per_row:
                        place = place * 0
                        row += 1
            t += at_once

    return with_lanes(dense, lanes)


def _depthwise(target: Target) -> KernelFunction:
    """y = clamp(bias + sum over taps of w x), channel by channel.

    Slots: 0 weights [tap][channels] float32, 1 x, 2 y, 3 bias, 4 unused, 5 channels (padded to 16),
    6 unused, 7 least and 23 most value (float32), 8 to 22 geometry. Threads share the rows.
    """
    columns = 2 if target.vector_bytes >= 64 else 1
    most = 4 if target.vector_bytes >= 32 else 2

    def of(count: int) -> Any:
        def some(
            w: Any, x: Any, y: Any, bias: Any, ny: Any, nx: Any, row_step: Any, tap_step: Any,
            w_row: Any, w_tap: Any, x_step: Any, y_step: Any, least: Any, highest: Any,
            vectors: Any,
        ) -> None:  # fmt: skip
            acc = repeat(load_f32(bias, vectors, 64), count)
            for ky in range(ny):
                p = x + ky * row_step
                q = w + ky * w_row
                left = nx
                while left > 0:
                    acc = fma(
                        load_f32_grid(p, count, vectors, x_step, 64),
                        repeat(load_f32(q, vectors, 64), count), acc,
                    )  # fmt: skip
                    p = p + tap_step
                    q = q + w_tap
                    left -= 1
            low = repeat(repeat(splat_f32(least), vectors), count)
            high = repeat(repeat(splat_f32(highest), vectors), count)
            store_f32_grid(y, minimum(high, maximum(acc, low)), vectors, y_step, 64)

        return some

    many, one = of(most), of(1)

    def depthwise(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        bias = arg_ptr(args, 3)
        channels = arg_int(args, 5)
        least = arg_float(args, 7)
        highest = arg_float(args, 23)
        height = arg_int(args, 9)
        width = arg_int(args, 10)
        out_height = arg_int(args, 11)
        out_width = arg_int(args, 12)
        tall = arg_int(args, 13)
        wide = arg_int(args, 14)
        step_y = arg_int(args, 15)
        step_x = arg_int(args, 16)
        above = arg_int(args, 17)
        before = arg_int(args, 18)
        apart_y = arg_int(args, 19)
        apart_x = arg_int(args, 20)
        pixel = arg_int(args, 21)
        out_pixel = arg_int(args, 22)
        rows = arg_int(args, 8) * out_height
        w_tap = channels * 4
        row_step = apart_y * width * pixel
        tap_step = apart_x * pixel
        for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
            image = row // out_height
            iy = (row - image * out_height) * step_y - above
            ky = _first(iy, apart_y)
            ny = _behind(iy, apart_y, tall, height) - ky
            source = x + (image * height + iy + ky * apart_y) * width * pixel
            ox = row * 0
            while ox < out_width:
                ix = ox * step_x - before
                reached = ix + (wide - 1) * apart_x  # by the last tap
                n = ox * 0 + 1
                kx = ox * 0
                nx = wide
                if ix >= 0 and reached < width:
                    if out_width - ox >= most and reached + (most - 1) * step_x < width:
                        n = n * 0 + most
                else:
                    kx = _first(ix, apart_x)
                    nx = _behind(ix, apart_x, wide, width) - kx
                at = (ky * wide + kx) * w_tap
                p = source + (ix + kx * apart_x) * pixel
                to = (row * out_width + ox) * out_pixel
                c = ox * 0
                while c + columns * 16 <= channels:
                    if n == most:
                        many(
                            w + (at + c * 4), p + c * 4, y + (to + c * 4), bias + c * 4, ny, nx,
                            row_step, tap_step, wide * w_tap, w_tap, step_x * pixel, out_pixel,
                            least, highest, columns,
                        )  # fmt: skip
                    else:
                        one(
                            w + (at + c * 4), p + c * 4, y + (to + c * 4), bias + c * 4, ny, nx,
                            row_step, tap_step, wide * w_tap, w_tap, step_x * pixel, out_pixel,
                            least, highest, columns,
                        )  # fmt: skip
                    c += columns * 16
                if columns > 1 and c < channels:
                    if n == most:
                        many(
                            w + (at + c * 4), p + c * 4, y + (to + c * 4), bias + c * 4, ny, nx,
                            row_step, tap_step, wide * w_tap, w_tap, step_x * pixel, out_pixel,
                            least, highest, 1,
                        )  # fmt: skip
                    else:
                        one(
                            w + (at + c * 4), p + c * 4, y + (to + c * 4), bias + c * 4, ny, nx,
                            row_step, tap_step, wide * w_tap, w_tap, step_x * pixel, out_pixel,
                            least, highest, 1,
                        )  # fmt: skip
                ox += n

    return depthwise


# --- references and cases -------------------------------------------------------------------------


def reference(
    x: np.ndarray, w: np.ndarray, geometry: Geometry, *, depthwise: bool = False
) -> np.ndarray:
    """A convolution in float64, without bias.

    Args:
        x: [images, rows, columns, channels].
        w: [taps down, taps across, channels, channels written]; of `depthwise`, without the last.
    """
    import numpy as np

    (height, width), (rows, columns) = geometry.read, geometry.written
    out = np.zeros((len(x), rows, columns, w.shape[-1]))
    for ky in range(geometry.taps[0]):
        for kx in range(geometry.taps[1]):
            for oy in range(rows):
                iy = oy * geometry.strides[0] - geometry.pads[0] + ky * geometry.dilations[0]
                for ox in range(columns):
                    ix = ox * geometry.strides[1] - geometry.pads[1] + kx * geometry.dilations[1]
                    if 0 <= iy < height and 0 <= ix < width:
                        v = x[:, iy, ix].astype(np.float64)
                        out[:, oy, ox] += v * w[ky, kx] if depthwise else v @ w[ky, kx]
    return out


def tiled_weights(w: np.ndarray) -> np.ndarray:
    """Weights [down, across, channels, written] as `_dense` reads them, padded to whole tiles."""
    import numpy as np

    taps = w.reshape(-1, w.shape[2], w.shape[3])
    n_tiles = -(-w.shape[3] // TILE_ROWS)
    padded = np.zeros((*taps.shape[:2], n_tiles * TILE_ROWS), np.float32)
    padded[..., : w.shape[3]] = taps
    split = padded.reshape(*taps.shape[:2], n_tiles, TILE_ROWS)
    return np.ascontiguousarray(split.transpose(2, 0, 1, 3))


_SHAPES: Sequence[tuple[Geometry, int, int]] = (  # channels read and written
    (Geometry(1, (1, 31), (1, 31), (1, 1)), 5, 40),
    (Geometry(2, (5, 17), (5, 17), (3, 3), pads=(1, 1)), 3, 16),
    (Geometry(1, (9, 33), (5, 17), (3, 3), (2, 2), (1, 1)), 16, 48),
    (Geometry(1, (4, 3), (4, 3), (5, 5), pads=(2, 2)), 32, 32),
    (Geometry(1, (9, 21), (5, 17), (3, 3), dilations=(2, 2)), 17, 20),
    (Geometry(1, (1, 1), (1, 1), (1, 1)), 64, 100),
)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, read, written) in enumerate(_SHAPES):
        padded = -(-written // TILE_ROWS) * TILE_ROWS
        x = rng.standard_normal((geometry.images, *geometry.read, read)).astype(np.float32)
        w = rng.standard_normal((*geometry.taps, read, written)).astype(np.float32)
        x[0, 0, 0] *= 1000
        bias = np.zeros(padded, np.float32)
        bias[:written] = rng.standard_normal(written)
        shape = (geometry.images, *geometry.written, padded)
        y = np.full(shape, np.nan, np.float32)
        more = rng.standard_normal(shape).astype(np.float32) if i % 2 else None
        low, high = (-INFINITE, INFINITE) if i < 2 else (0.0, 6.0)
        exact = np.zeros(shape)
        exact[..., :written] = reference(x, w, geometry)
        size = np.zeros(shape)
        size[..., :written] = reference(np.abs(x), np.abs(w), geometry)
        added = bias if more is None else bias + more.astype(np.float64)
        expected = np.clip(exact + added, low, high)
        # Each product and sum is rounded once.
        terms = geometry.taps[0] * geometry.taps[1] * read + 3
        slots = [
            tiled_weights(w), x, y, bias, 0 if more is None else more, read, padded // TILE_ROWS,
            low, *geometry.slots(read * 4, padded * 4), high,
        ]  # fmt: skip
        bound = (size + np.abs(added)) * terms * 2.0**-24 + 1e-30
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{geometry}, {written}")


def _depthwise_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, _, written) in enumerate(_SHAPES):
        padded = -(-written // TILE_ROWS) * TILE_ROWS
        x = rng.standard_normal((geometry.images, *geometry.read, padded)).astype(np.float32)
        w = rng.standard_normal((*geometry.taps, padded)).astype(np.float32)
        bias = rng.standard_normal(padded).astype(np.float32)
        y = np.full((geometry.images, *geometry.written, padded), np.nan, np.float32)
        low, high = (-INFINITE, INFINITE) if i < 2 else (0.0, 6.0)
        exact = reference(x, w, geometry, depthwise=True)
        size = reference(np.abs(x), np.abs(w), geometry, depthwise=True)
        slots = [
            w, x, y, bias, 0, padded, 0, low, *geometry.slots(padded * 4, padded * 4), high,
        ]  # fmt: skip
        terms = geometry.taps[0] * geometry.taps[1] + 2
        bound = (size + np.abs(bias)) * terms * 2.0**-24 + 1e-30
        expected = np.clip(exact + bias, low, high).astype(np.float32)
        yield Case(slots, [(y, expected)], bound, f"{geometry}, {padded}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.sparse.format")
    return [
        Kernel("convolution_f32", _dense, sources, _cases, __name__),
        Kernel("depthwise_f32", _depthwise, sources, _depthwise_cases, __name__),
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
