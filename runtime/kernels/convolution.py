"""Convolutions of float32 images that lie pixel by pixel, channels innermost ("NHWC").

Rows of channels that are written are padded to a multiple of 16; pads get what bias and weights of
absent channels give, which whoever makes those leaves zero. No image is copied or padded: taps that
fall outside are left out, pixel by pixel at the borders.

Geometry (the slots from `GEOMETRY` on): 0 images, 1 and 2 rows and columns of what is read, 3 and 4
of what is written, 5 and 6 of taps, 7 and 8 strides, 9 and 10 pads above and to the left, 11 and 12
dilations, 13 bytes of a pixel that is read, 14 of one that is written.

What is written may be finished (the slots from `LAST` on): 0 whether it is, 1 whether something is
added then, 2 bytes between pixels of that, 3 least and 4 most value (float32), 5 to 9 `Finish`.
Then come groups of tiles (`Groups`): 10 tiles of a group, 11 bytes from what one group reads to
what the next one does, 12 groups across, 13 and 14 bytes between what they write, across and down,
15 bytes between rows that are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headrace.kernels.finishes import HARD_SWISH, NONE, SIGMOID, SILU, Finish, finished
from headrace.kernels.finishes import INFINITE as INFINITE
from headrace.kernels.finishes import error_bound as finish_error
from headrace.kernels.finishes import reference as finish_reference
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
LAST = 24
FEW, PAIR = 4, 2  # pixels at a time where there are not enough for more
NOTHING = Finish(NONE)


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

    @property
    def pixels(self) -> int:
        """That are written, of all images."""
        return self.images * self.written[0] * self.written[1]

    def slots(self, read_bytes: int, written_bytes: int) -> list[int]:
        """Of an argument block; bytes are of pixels."""
        return [
            self.images, *self.read, *self.written, *self.taps, *self.strides, *self.pads,
            *self.dilations, read_bytes, written_bytes,
        ]  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """Tiles that read other channels than the next ones, or write to another place.

    Attributes:
        tiles: of a group.
        read: bytes from what one group reads to what the next one does.
        across: groups that write beside each other.
        apart: bytes between what these write, and what those below them write.
        row: bytes between rows that are written.
    """

    tiles: int
    read: int
    across: int
    apart: tuple[int, int]
    row: int

    def slots(self) -> list[int]:
        """Of an argument block."""
        return [self.tiles, self.read, self.across, *self.apart, self.row]


def one_group(tiles: int, geometry: Geometry, written_bytes: int) -> Groups:
    """All tiles read the same, and write side by side."""
    return Groups(max(1, tiles), 0, 1, (0, 0), geometry.written[1] * written_bytes)


@dataclass(frozen=True)
class Ending:
    """What is done last: bounds, and before them an activation and a sum.

    Attributes:
        late: whether what is added is so behind the activation, or lies otherwise than results do.
        more_bytes: between pixels of what is added.
    """

    least: float = -INFINITE
    most: float = INFINITE
    finish: Finish = NOTHING
    late: bool = False
    more_bytes: int = 0

    @property
    def ends(self) -> bool:
        """Whether there is more to do than bounds, and something added that lies as results do."""
        return self.late or self.finish.kind != NONE

    def bounds(self) -> tuple[float, float]:
        """Of what is finished after that."""
        return (-INFINITE, INFINITE) if self.ends else (self.least, self.most)

    def slots(self) -> list[Any]:
        """Of an argument block."""
        return [
            int(self.ends), int(self.late), self.more_bytes, self.least, self.most,
            *self.finish.slots(),
        ]  # fmt: skip


def pixels_at_once(target: Target) -> int:
    """Pixels whose sums a convolution has in registers, for each of `gemm_tiles` tiles."""
    return 8 if target.gemm_tiles > 1 else target.tokens("f32")


def first_tap(begin: Any, step: Any) -> Any:
    """The first tap that does not fall in front of the image, which begins at -`begin`."""
    found = begin * 0
    if begin < 0:
        found = (step - 1 - begin) // step
    return found


def behind_taps(begin: Any, step: Any, taps: Any, size: Any) -> Any:
    """The first tap that falls behind the image."""
    return smaller(taps, larger(begin * 0, (size - begin + step - 1) // step))


def _dense(target: Target) -> KernelFunction:
    """y = clamp(activation(bias + sum over taps and channels of w x), or with more added to it).

    Slots: 0 weights (tiles of 16 channels that are written: [tap][channel read][16] float32),
    1 x, 2 y, 3 bias (16 a tile), 4 what is added (0: nothing; if not late, it lies as y does),
    5 channels read of a group, 6 tiles, 7 least and 23 most value (float32) of what is not yet
    finished, 8 to 22 geometry, 24 to 33 what is done last, 34 to 39 groups.
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
    few, two, one = of(FEW), of(PAIR), of(1)

    def dense(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        bias = arg_ptr(args, 3)
        ends = arg_int(args, 24) != 0
        late = arg_int(args, 25) != 0
        adds = arg_int(args, 4) != 0 and not late
        more = arg_ptr(args, 4)
        channels = arg_int(args, 5)
        n_tiles = arg_int(args, 6)
        least = arg_float(args, 7)
        highest = arg_float(args, 23)
        group = arg_int(args, 34)
        out_row = arg_int(args, 39)
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
            g = t // group
            if tiles > 1 and t + tiles <= smaller(end, (g + 1) * group):
                at_once = at_once * 0 + tiles
            down = g // arg_int(args, 36)
            there = (g - down * arg_int(args, 36)) * arg_int(args, 37)
            there = there + down * arg_int(args, 38) + (t - g * group) * 64
            for s in range(strips):
                tile = strip(w + t * tile_stride, s)
                column = t * 64 + s * lanes * 4
                side = there + s * lanes * 4
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
                        ky = first_tap(iy, apart_y)
                        ny = behind_taps(iy, apart_y, tall, height) - ky
                        source = x + ((image * height + iy + ky * apart_y) * width * pixel)
                        source = source + g * arg_int(args, 35)
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
                            elif stop - ox >= PAIR and reached + (PAIR - 1) * step_x < width:
                                n = n * 0 + PAIR
                        else:
                            kx = first_tap(ix, apart_x)
                            nx = behind_taps(ix, apart_x, wide, width) - kx
                        at = w_row * ky + kx * channels * 64
                        to = row * out_row + ox * out_pixel + side
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
                            elif n == PAIR:
                                two(
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
                        elif n == PAIR:
                            two(
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
                    if ends:
                        finished(
                            y + (row * out_row + left_end * out_pixel + side),
                            more + ((row * out_width + left_end) * arg_int(args, 26) + side),
                            stop - left_end, at_once, out_pixel, arg_int(args, 26),
                            arg_int(args, 29), arg_float(args, 30), arg_float(args, 31),
                            arg_float(args, 32), arg_float(args, 33), late, arg_float(args, 27),
                            arg_float(args, 28),
                        )  # fmt: skip
                    place += 1
                    if place == per_row:
                        place = place * 0
                        row += 1
            t += at_once

    return with_lanes(dense, lanes)


def _depthwise(target: Target) -> KernelFunction:
    """y = clamp(activation(bias + sum over taps of w x)), channel by channel.

    Slots: 0 weights [tap][channels] float32, 1 x, 2 y, 3 bias, 4 what is added late (0: nothing),
    5 channels (padded to 16), 6 unused, 7 least and 23 most value (float32) of what is not yet
    finished, 8 to 22 geometry, 24 to 33 what is done last. Threads share the rows.
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
        ends = arg_int(args, 24) != 0
        late = arg_int(args, 25) != 0
        more = arg_ptr(args, 4)
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
            ky = first_tap(iy, apart_y)
            ny = behind_taps(iy, apart_y, tall, height) - ky
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
                    kx = first_tap(ix, apart_x)
                    nx = behind_taps(ix, apart_x, wide, width) - kx
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
                if ends:
                    finished(
                        y + to, more + (row * out_width + ox) * arg_int(args, 26), n,
                        channels // 16, out_pixel, arg_int(args, 26), arg_int(args, 29),
                        arg_float(args, 30), arg_float(args, 31), arg_float(args, 32),
                        arg_float(args, 33), late, arg_float(args, 27), arg_float(args, 28),
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


_ENDINGS = (  # of the shapes, in turn
    Ending(), Ending(late=True, finish=Finish(SILU)), Ending(0.0, 6.0),
    Ending(0.0, 6.0, late=True), Ending(finish=Finish(HARD_SWISH, 1 / 6, 0.5, 1.5, -0.25)),
    Ending(finish=Finish(SIGMOID)),
)  # fmt: skip


def _ended(
    exact: np.ndarray, bound: np.ndarray, ending: Ending, more: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What comes out in float64, and how far it may be off, for sums that are off by `bound`."""
    import numpy as np

    if more is not None and not ending.late:
        exact = exact + more.astype(np.float64)
        bound = bound + np.abs(exact) * 2.0**-23 + np.abs(more) * 2.0**-23
    if ending.finish.kind != NONE:
        bound = bound * 2 * abs(ending.finish.scale) + finish_error(exact, ending.finish)
        exact = finish_reference(exact, ending.finish)
    if more is not None and ending.late:
        exact = exact + more.astype(np.float64)
        bound = bound + np.abs(exact) * 2.0**-23 + np.abs(more) * 2.0**-23
    return np.clip(exact, ending.least, ending.most), bound + 1e-30


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, read, written) in enumerate(_SHAPES):
        padded, wider = -(-written // TILE_ROWS) * TILE_ROWS, 16 * (i % 3)
        x = rng.standard_normal((geometry.images, *geometry.read, read)).astype(np.float32)
        w = rng.standard_normal((*geometry.taps, read, written)).astype(np.float32)
        x[0, 0, 0] *= 1000
        bias = np.zeros(padded, np.float32)
        bias[:written] = rng.standard_normal(written)
        shape = (geometry.images, *geometry.written, padded)
        ending = replace(_ENDINGS[i], more_bytes=(padded + wider) * 4)
        y = np.full(shape, np.nan, np.float32)
        more = None
        if i % 2:
            apart = padded + (wider if ending.late else 0)
            more = rng.standard_normal((*shape[:3], apart)).astype(np.float32)
        exact = np.zeros(shape)
        exact[..., :written] = reference(x, w, geometry)
        size = np.zeros(shape)
        size[..., :written] = reference(np.abs(x), np.abs(w), geometry)
        # Each product and sum is rounded once.
        terms = geometry.taps[0] * geometry.taps[1] * read + 3
        bound = (size + np.abs(bias)) * terms * 2.0**-24
        added = None if more is None else more[..., :padded]
        expected, bound = _ended(exact + bias, bound, ending, added)
        low, high = ending.bounds()
        groups = one_group(padded // TILE_ROWS, geometry, padded * 4)
        slots = [
            tiled_weights(w), x, y, bias, 0 if more is None else more, read, padded // TILE_ROWS,
            low, *geometry.slots(read * 4, padded * 4), high, *ending.slots(), *groups.slots(),
        ]  # fmt: skip
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{geometry}, {written}")
    yield from _group_cases(rng)


def _group_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Groups that read other channels, and groups that write other pixels."""
    import numpy as np

    geometry, read, written = Geometry(1, (5, 19), (5, 19), (3, 3), pads=(1, 1)), 6, 48
    x = rng.standard_normal((1, *geometry.read, 3 * read)).astype(np.float32)
    w = rng.standard_normal((3, *geometry.taps, read, written)).astype(np.float32)
    y = np.full((1, *geometry.written, 3 * written), np.nan, np.float32)
    parts = [x[..., read * i : read * (i + 1)] for i in range(3)]
    exact = [reference(part, one, geometry) for part, one in zip(parts, w, strict=True)]
    size = [
        reference(np.abs(part), np.abs(one), geometry) for part, one in zip(parts, w, strict=True)
    ]
    bias = np.zeros(3 * written, np.float32)
    tiles = np.concatenate([tiled_weights(one) for one in w])
    groups = Groups(written // 16, read * 4, 3, (written * 4, 0), 19 * y.shape[-1] * 4)
    slots = [
        tiles, x, y, bias, 0, read, len(tiles), -INFINITE,
        *geometry.slots(x.shape[-1] * 4, y.shape[-1] * 4), INFINITE, *Ending().slots(),
        *groups.slots(),
    ]  # fmt: skip
    bound = np.concatenate(size, -1) * 60 * 2.0**-24 + 1e-30
    yield Case(slots, [(y, np.concatenate(exact, -1).astype(np.float32))], bound, "3 groups")

    geometry = Geometry(2, (3, 9), (3, 9), (1, 1))
    x = rng.standard_normal((2, 3, 9, 5)).astype(np.float32)
    w = rng.standard_normal((6, 1, 1, 5, 16)).astype(np.float32)  # of 2 x 3 places
    y = np.full((2, 6, 27, 16), np.nan, np.float32)
    bias = rng.standard_normal(16 * 6).astype(np.float32)
    expected = np.zeros(y.shape)
    for i in range(6):
        there = reference(x, w[i], geometry) + bias[16 * i : 16 * i + 16]
        expected[:, i // 3 :: 2, i % 3 :: 3] = there
    tiles = np.concatenate([tiled_weights(one) for one in w])
    groups = Groups(1, 0, 3, (64, 27 * 64), 2 * 27 * 64)
    ending = Ending(finish=Finish(SILU))
    bound = np.full(y.shape, float(np.abs(expected).max()) * 8 * 2.0**-23)
    expected, bound = _ended(expected, bound, ending, None)
    slots = [
        tiles, x, y, bias, 0, 5, 6, -INFINITE, *geometry.slots(20, 3 * 64), INFINITE,
        *ending.slots(), *groups.slots(),
    ]  # fmt: skip
    yield Case(slots, [(y, expected.astype(np.float32))], bound, "2 x 3 places")


def _depthwise_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, _, written) in enumerate(_SHAPES):
        padded = -(-written // TILE_ROWS) * TILE_ROWS
        x = rng.standard_normal((geometry.images, *geometry.read, padded)).astype(np.float32)
        w = rng.standard_normal((*geometry.taps, padded)).astype(np.float32)
        bias = rng.standard_normal(padded).astype(np.float32)
        shape = (geometry.images, *geometry.written, padded)
        y = np.full(shape, np.nan, np.float32)
        ending = replace(_ENDINGS[i], more_bytes=padded * 4)
        more = rng.standard_normal(shape).astype(np.float32) if ending.late else None
        exact = reference(x, w, geometry, depthwise=True) + bias
        size = reference(np.abs(x), np.abs(w), geometry, depthwise=True) + np.abs(bias)
        bound = size * (geometry.taps[0] * geometry.taps[1] + 2) * 2.0**-24
        expected, bound = _ended(exact, bound, ending, more)
        low, high = ending.bounds()
        slots = [
            w, x, y, bias, 0 if more is None else more, padded, 0, low,
            *geometry.slots(padded * 4, padded * 4), high, *ending.slots(),
        ]  # fmt: skip
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{geometry}, {padded}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (
        __name__, "headrace.sparse.format", "headrace.kernels.finishes", "headrace.kernels.math",
    )  # fmt: skip
    return [
        Kernel("convolution_f32", _dense, sources, _cases, __name__),
        Kernel("depthwise_f32", _depthwise, sources, _depthwise_cases, __name__),
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
