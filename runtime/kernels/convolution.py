"""Convolutions of float32 images that lie pixel by pixel, channels innermost ("NHWC").

Rows of channels that are written are padded to a multiple of 16; pads get what bias and weights of
absent channels give, which whoever makes those leaves zero. No image is copied or padded: taps that
fall outside are left out, pixel by pixel at the borders.

Behind the slots of `headrace.kernels.geometry` and `headrace.kernels.ending` come groups of tiles
(`headrace.kernels.groups`): 34 tiles of a group, 35 bytes from what one group reads to what the
next one does, 36 groups across, 37 and 38 bytes between what they write, across and down, 39 bytes
between rows that are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.kernels.ending import ENDINGS, Ending, end_pixels, ended
from headrace.kernels.finishes import INFINITE, SILU, Finish
from headrace.kernels.geometry import (
    SHAPES,
    Geometry,
    geometry_of,
    reference,
    taps_inside,
)
from headrace.kernels.groups import Groups, one_group
from headrace.sparse.format import TILE_ROWS
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    by_token,
    fma_columns,
    larger,
    load_f32,
    load_f32_grid,
    maximum,
    minimum,
    outer,
    prefetch_l2,
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

FEW = 4  # pixels at a time where there are not enough for more
RUN = 4  # channels for which addresses of pixels are formed once


def some_tiles(slots: list[Any], first: int, tiles: int) -> list[Any]:
    """The argument block for some tiles of one group, out of that for all."""
    found = [*slots]
    for slot in (2, 3, 4) if slots[4] else (2, 3):
        found[slot] += first * TILE_ROWS * 4
    found[6] = found[34] = tiles
    return found


def pixels_at_once(target: Target) -> int:
    """Pixels whose sums a convolution has in registers, for each of `gemm_tiles` tiles."""
    return 8 if target.gemm_tiles > 1 else target.tokens("f32")


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
    # One tile alone takes more pixels: a sum has to wait for the one before it.
    most_of_one = most * tiles

    def of(count: int, rows: int) -> Any:
        def some(
            w: Any, x: Any, y: Any, bias: Any, more: Any, channels: Any, ny: Any, nx: Any,
            row_step: Any, tap_step: Any, w_row: Any, tile_stride: Any, x_step: Any, y_step: Any,
            least: Any, highest: Any, adds: Any, lines: Any, ahead: Any,
        ) -> None:  # fmt: skip
            acc = outer(load_f32(bias, rows, 64), repeat(splat_f32(1.0), count))
            rows_left = ny
            while rows_left > 0:
                p_row = x
                q = w
                taps_left = nx
                while taps_left > 0:
                    p = p_row
                    left = channels
                    while left >= RUN:
                        if lines > 0:  # of other weights come from memory meanwhile
                            prefetch_l2(ahead)
                            if lines > 1:
                                prefetch_l2(ahead + 64)
                                prefetch_l2(ahead + 128)
                                prefetch_l2(ahead + 192)
                            ahead = ahead + lines * 64
                        acc = fma_columns(acc, q, p, RUN, rows, tile_stride, count, x_step)
                        p = p + RUN * 4
                        q = q + RUN * 64
                        left -= RUN
                    while left > 0:
                        acc = fma_columns(acc, q, p, 1, rows, tile_stride, count, x_step)
                        p = p + 4
                        q = q + 64
                        left -= 1
                    p_row = p_row + tap_step
                    taps_left -= 1
                x = x + row_step
                w = w + w_row
                rows_left -= 1
            found = by_token(acc)
            if adds:
                found = found + load_f32_grid(more, rows, count, 64, y_step)
            low = repeat(repeat(splat_f32(least), rows), count)
            high = repeat(repeat(splat_f32(highest), rows), count)
            store_f32_grid(y, minimum(high, maximum(found, low)), count, 64, y_step)

        return some

    many, four, one = (of(n, 1) for n in (most_of_one, FEW, 1))
    eight = of(most, 1) if tiles > 1 else many
    eights, sevens, sixes, fives, fours, pair, single = (
        of(n, tiles) for n in (8, 7, 6, 5, 4, 2, 1)
    )

    def dense(args: Any, thread: Any, n_threads: Any) -> None:
        (
            images, height, width, out_height, out_width, tall, wide, step_y, step_x, above, before,
            apart_y, apart_x, pixel, out_pixel,
        ) = geometry_of(args)  # fmt: skip
        w = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        bias = arg_ptr(args, 3)
        ends = arg_int(args, 24) != 0
        more = arg_ptr(args, 4)
        channels = arg_int(args, 5)
        n_tiles = arg_int(args, 6)
        group = arg_int(args, 34)
        out_row = arg_int(args, 39)
        w_row = wide * channels * 64
        tile_stride = tall * w_row
        row_step = apart_y * width * pixel
        tap_step = apart_x * pixel
        x_step = step_x * pixel
        least = arg_float(args, 7)
        highest = arg_float(args, 23)
        adds = arg_int(args, 4) != 0 and arg_int(args, 25) == 0
        # Columns whose taps are all inside.
        inner = smaller(out_width, (before + step_x - 1) // step_x)
        behind = larger(inner, (width - 1 - (wide - 1) * apart_x + before) // step_x + 1)
        rows = images * out_height
        few = rows * ((out_width + most - 1) // most) < 4 * n_threads
        t = 0
        end = n_tiles
        if few:
            t = n_tiles * thread // n_threads // tiles * tiles
            if thread + 1 < n_threads:
                end = n_tiles * (thread + 1) // n_threads // tiles * tiles
        # While it multiplies by some tiles, the next come from memory: in at least 2 rounds.
        reach = tall * w_row // 4
        while t < end:
            at_once = 1
            span = most_of_one
            g = t // group
            if tiles > 1 and t + tiles <= smaller(end, (g + 1) * group):
                at_once = tiles
                span = most
            per_row = (out_width + span - 1) // span
            if tiles > 1 and at_once == tiles:  # about as many everywhere
                span = (out_width + per_row - 1) // per_row
            first = rows * per_row * thread // n_threads
            last = rows * per_row * (thread + 1) // n_threads
            if few:
                first = 0
                last = rows * per_row
            rounds = smaller(last - first, 8)
            down = g // arg_int(args, 36)
            there = (g - down * arg_int(args, 36)) * arg_int(args, 37)
            there = there + down * arg_int(args, 38) + (t - g * group) * 64
            for s in range(strips):
                tile = strip(w + t * tile_stride, s)
                column = t * 64 + s * lanes * 4
                side = there + s * lanes * 4
                row = first // per_row
                place = first - row * per_row
                fresh = -1  # the row whose borders are known
                ky = 0
                ny = 0
                source = x
                for u in range(first, last):
                    ahead = w + (t + at_once) * tile_stride
                    lines = 0
                    if s == 0 and t + 2 * at_once <= end and u - first < rounds:
                        lines = lines + (1 if rounds == 8 else 4)
                        ahead = ahead + (u - first) * lines * reach
                    if row != fresh:
                        fresh = row
                        image = row // out_height
                        iy = (row - image * out_height) * step_y - above
                        ky, ny = taps_inside(iy, apart_y, tall, height)
                        source = x + ((image * height + iy + ky * apart_y) * width * pixel)
                        source = source + g * arg_int(args, 35)
                    left_end = place * span
                    stop = smaller(left_end + span, out_width)
                    ox = left_end
                    while ox < stop:
                        ix = ox * step_x - before
                        n = 1
                        kx = 0
                        nx = wide
                        if ox >= inner and ox < behind:
                            n = smaller(stop, behind) - ox
                        else:
                            kx, nx = taps_inside(ix, apart_x, wide, width)
                        at = w_row * ky + kx * channels * 64
                        to = row * out_row + ox * out_pixel + side
                        p = source + (ix + kx * apart_x) * pixel
                        given = (
                            tile + at, p, y + to, bias + column, more + to, channels, ny, nx,
                            row_step, tap_step, w_row, tile_stride, x_step, out_pixel, least,
                            highest, adds, lines, ahead,
                        )  # fmt: skip
                        if tiles > 1 and at_once == tiles:
                            if n == 8:
                                eights(*given)
                            elif n == 7:
                                sevens(*given)
                            elif n == 6:
                                sixes(*given)
                            elif n == 5:
                                fives(*given)
                            elif n == 4:
                                fours(*given)
                            elif n >= 2:
                                n = 2
                                pair(*given)
                            else:
                                single(*given)
                        elif n >= most_of_one:
                            n = most_of_one
                            many(*given)
                        elif n >= most:
                            n = most
                            eight(*given)
                        elif n >= FEW:
                            n = FEW
                            four(*given)
                        else:
                            n = 1
                            one(*given)
                        ox += n
                    if ends:
                        end_pixels(
                            args, y + (row * out_row + left_end * out_pixel + side),
                            more + ((row * out_width + left_end) * arg_int(args, 26) + side),
                            stop - left_end, at_once, out_pixel,
                        )  # fmt: skip
                    place += 1
                    if place == per_row:
                        place = 0
                        row += 1
            t += at_once

    return with_lanes(dense, lanes)


# --- references and cases -------------------------------------------------------------------------


def tiled_weights(w: np.ndarray) -> np.ndarray:
    """Weights [down, across, channels, written] as `_dense` reads them, padded to whole tiles."""
    import numpy as np

    taps = w.reshape(-1, w.shape[2], w.shape[3])
    n_tiles = -(-w.shape[3] // TILE_ROWS)
    padded = np.zeros((*taps.shape[:2], n_tiles * TILE_ROWS), np.float32)
    padded[..., : w.shape[3]] = taps
    split = padded.reshape(*taps.shape[:2], n_tiles, TILE_ROWS)
    return np.ascontiguousarray(split.transpose(2, 0, 1, 3))


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, read, written) in enumerate(SHAPES):
        padded, wider = -(-written // TILE_ROWS) * TILE_ROWS, 16 * (i % 3)
        x = rng.standard_normal((geometry.images, *geometry.read, read)).astype(np.float32)
        w = rng.standard_normal((*geometry.taps, read, written)).astype(np.float32)
        x[0, 0, 0] *= 1000
        bias = np.zeros(padded, np.float32)
        bias[:written] = rng.standard_normal(written)
        shape = (geometry.images, *geometry.written, padded)
        ending = replace(ENDINGS[i], more_bytes=(padded + wider) * 4)
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
        expected, bound = ended(exact + bias, bound, ending, added)
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
    expected, bound = ended(expected, bound, ending, None)
    slots = [
        tiles, x, y, bias, 0, 5, 6, -INFINITE, *geometry.slots(20, 3 * 64), INFINITE,
        *ending.slots(), *groups.slots(),
    ]  # fmt: skip
    yield Case(slots, [(y, expected.astype(np.float32))], bound, "2 x 3 places")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (
        __name__, "headrace.sparse.format", "headrace.kernels.ending", "headrace.kernels.finishes",
        "headrace.kernels.geometry", "headrace.kernels.math",
    )  # fmt: skip
    return [Kernel("convolution_f32", _dense, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
