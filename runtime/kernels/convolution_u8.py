"""Convolutions of images of bytes, with int8 weights that have a scale for each channel.

Layout and rounding: `headrace.kernels.requantise`. Activations are unsigned, weights lie in
-127..127, sums are int32 and wrap. Where a CPU multiplies signed bytes, 128 is taken from
activations and 128 * (sum of weights) added to sums. No image is copied or padded: taps that fall
outside read a pixel of zero points.

The weights of the next group of tiles are asked for while pixels are multiplied by one, a line of
cache for each group of pixels; those of a pixel alone some way ahead.

Weights and what ends the sums of a tile lie as `headrace.kernels.weights_u8` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from headrace.kernels.byte_matrix import PIXELS, quads_at_once, sums_of
from headrace.kernels.geometry import Geometry, geometry_of, reference
from headrace.kernels.requantise import (
    Quantised,
    folded_bias,
    pixel_bytes,
    requantised,
    rounding_slots,
    scales,
)
from headrace.kernels.weights_u8 import FOUR, QUAD, TAIL, tails, tiled_weights
from headrace.sparse.format import TILE_ROWS
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_i8x4,
    dot4_lanes,
    dot8_lanes,
    dot_init,
    dot_result,
    larger,
    load_f32,
    load_i32,
    load_u8,
    matrix_begin,
    matrix_end,
    prefetch,
    repeat,
    smaller,
    splat_i32,
    stack_bytes,
    store_f32_grid,
    store_u8_rows,
    to_bytes,
    to_f32,
    xor_u8,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

FEW = 4  # pixels whose sums are taken from memory at once


def pixels_at_once(target: Target) -> dict[int, tuple[int, ...]]:
    """Pixels whose sums are in registers, by the number of tiles; fewer for those that are left."""
    if target.vector_bytes >= 64:
        return {4: (6,), 2: (12, 8, 4), 1: (12,)}
    return {4: (1,), 2: (2,), 1: (4,)}


def cheaper(width: Any, larger: Any, smaller: Any) -> Any:
    """Which number of pixels at once takes less time, where those left over are taken again."""
    found = smaller
    if width >= larger:
        turns = (width + larger - 1) // larger
        if turns * (larger + 1) < (width + smaller - 1) // smaller * (smaller + 1):
            found = larger
    return found


def some_tiles(slots: list[Any], first: int, tiles: int) -> list[Any]:
    """The argument block for some tiles, out of that for all; `first` is a multiple of FOUR."""
    found = [*slots]
    found[2] += first * TILE_ROWS * (4 if slots[25] else 1)
    found[3] += first * TAIL
    found[6] = tiles
    return found


def _dense(target: Target) -> KernelFunction:
    """y = requantised(bias + sum over taps and channels of w x), or the sum times scale as float32.

    Slots: 0 weights (`tiled_weights`), 1 x, 2 y, 3 tails of tiles (`tails`), 4 a pixel of zero
    points, 5 quads of bytes of a tap, 6 tiles, 7 most, 8 to 22 geometry, 23 zero point,
    24 least, 25 whether results are float32, 26 whether threads share tiles before pixels.
    """
    signed, ahead = target.dot_bias(8) == 0, target.ahead
    in_matrices = target.byte_matrix

    def finish(rows: int, count: int) -> Any:
        """What makes sums of pixels what is written."""
        per_vector = FOUR // rows  # pixels whose results are one vector of bytes
        spare = max(1, per_vector // count)

        def finished(
            sums: Any, y: Any, tail: Any, zero: Any, least: Any, most: Any, floats: Any, y_step: Any
        ) -> None:
            found = to_f32(sums) * repeat(load_f32(tail + 64, rows, TAIL), count)
            if rows != FOUR and floats:
                found = found + repeat(load_f32(tail + 192, rows, TAIL), count)
                store_f32_grid(y, found, rows, y_step, 64)
            else:
                if spare > 1:
                    found = repeat(found, spare)
                code = to_bytes(found, splat_i32(zero), splat_i32(least), splat_i32(most))
                store_u8_rows(y, code, per_vector, count, y_step)

        return finished

    def of(rows: int, count: int, edge: bool) -> Any:
        finished = finish(rows, count)

        def some(
            w: Any, x: Any, y: Any, tail: Any, outside: Any, quads: Any, tall: Any, wide: Any,
            top: Any, left: Any, apart_y: Any, apart_x: Any, height: Any, width: Any, pixel: Any,
            x_step: Any, y_step: Any, zero: Any, least: Any, most: Any, floats: Any,
            ahead: Any, lines: Any,
        ) -> None:  # fmt: skip
            start = load_i32(tail, rows, TAIL)
            if signed:
                start = start + load_i32(tail + 128, rows, TAIL)
            acc = dot_init(start, count)
            q = w
            for ky in range(tall):
                iy = top + ky * apart_y
                for kx in range(wide):
                    ix = left + kx * apart_x
                    p = outside
                    step = 0
                    if iy >= 0 and iy < height and (not edge or (ix >= 0 and ix < width)):
                        p = x + (iy * width + ix) * pixel
                        step = x_step
                    n = quads
                    while n >= 2:
                        for line in range(lines):
                            prefetch(q + (ahead + line * 64))
                        acc = dot8_lanes(
                            acc, xor_u8(bcast_i8x4(p, count, step), 0x80),
                            xor_u8(bcast_i8x4(p + 4, count, step), 0x80), load_u8(q, rows, 64),
                            load_u8(q + rows * 64, rows, 64), 8,
                        )  # fmt: skip
                        p = p + 8
                        q = q + rows * 128
                        n -= 2
                    if n > 0:
                        acc = dot4_lanes(
                            acc, xor_u8(bcast_i8x4(p, count, step), 0x80), load_u8(q, rows, 64), 8
                        )
                        q = q + rows * 64
            finished(dot_result(acc, 8), y, tail, zero, least, most, floats, y_step)

        return some

    def matrix_of(rows: int, registers: int) -> Any:
        """The same of 16 pixels for each register, whose taps are all inside."""
        sums, finished = sums_of(rows, registers), finish(rows, FEW)

        def some(
            at_once: Any, w: Any, x: Any, y: Any, tail: Any, outside: Any, quads: Any, tall: Any,
            wide: Any, top: Any, left: Any, apart_y: Any, apart_x: Any, height: Any, width: Any,
            pixel: Any, x_step: Any, y_step: Any, zero: Any, least: Any, most: Any, floats: Any,
            ahead: Any,
        ) -> None:  # fmt: skip
            found = stack_bytes(4096)
            sums(
                found, w, x, outside, quads, at_once, tall, wide, top, left, apart_y, apart_x,
                height, width, pixel, x_step, ahead,
            )  # fmt: skip
            start = repeat(load_i32(tail, rows, TAIL), FEW)
            for i in range(0, 16 * registers, FEW):
                block = load_i32(found + i * rows * 64, FEW * rows, 64) + start
                finished(block, y + i * y_step, tail, zero, least, most, floats, y_step)

        return some

    def tiles_of(rows: int, pixels: tuple[int, ...]) -> Any:
        largest, middle, least_pixels = (pixels * 3)[:3]
        many, some, few = (of(rows, n, False) for n in (largest, middle, least_pixels))
        one = of(rows, 1, True)
        registers = 1 if rows == FOUR else 2
        wide_matrix, matrix = matrix_of(rows, registers), matrix_of(rows, 1)

        def groups(
            args: Any, thread: Any, n_threads: Any, n_groups: Any, w: Any, y: Any, tail: Any
        ) -> None:
            x = arg_ptr(args, 1)
            outside = arg_ptr(args, 4)
            quads = arg_int(args, 5)
            most = arg_int(args, 7)
            (
                images, height, width, out_height, out_width, tall, wide, step_y, step_x, above,
                before, apart_y, apart_x, pixel, out_pixel,
            ) = geometry_of(args)  # fmt: skip
            zero = arg_int(args, 23)
            least = arg_int(args, 24)
            floats = arg_int(args, 25) != 0
            by_tiles = arg_int(args, 26) != 0
            # Pixels whose taps are all inside, in a row; the others are taken one by one.
            reach = (wide - 1) * apart_x
            begin = smaller((before + step_x - 1) // step_x, out_width)
            end = larger(begin, smaller(out_width, (width - 1 - reach + before) // step_x + 1))
            taken = cheaper(end - begin, middle, least_pixels)
            taken = cheaper(end - begin, largest, taken)
            at_once = 0
            if in_matrices and end - begin >= PIXELS:
                at_once = quads_at_once(quads)
            if in_matrices and at_once > 0:
                taken = PIXELS
                if end - begin >= registers * PIXELS:
                    taken = registers * PIXELS
                matrix_begin(at_once * QUAD)
            if end - begin < taken:
                begin = out_width
                end = out_width
            per_row = larger(1, (end - begin + taken - 1) // taken)
            units = images * out_height * per_row
            group_bytes = tall * wide * quads * rows * 64
            # Turns by some weights have the next ones come from memory, all lines of them.
            lines = 1
            if at_once == 0 and units < 2 * rows:
                lines = (2 * rows + units - 1) // units
            wrote = rows * 16
            if floats:
                wrote = wrote * 4
            for g in range(n_groups):
                first = units * thread // n_threads
                last = units * (thread + 1) // n_threads
                if by_tiles:
                    first = larger(0, n_groups * units * thread // n_threads - g * units)
                    last = smaller(units, n_groups * units * (thread + 1) // n_threads - g * units)
                for u in range(first, last):
                    row = u // per_row
                    chunk = u - row * per_row
                    image = row // out_height
                    top = (row - image * out_height) * step_y - above
                    source = x + image * height * width * pixel
                    to = y + (row * out_width * out_pixel + g * wrote)
                    if end > begin:
                        # The last of them are taken once more with those before them.
                        ox = smaller(begin + chunk * taken, end - taken)
                        given = (
                            w + g * group_bytes, source, to + ox * out_pixel,
                            tail + g * rows * TAIL, outside, quads, tall, wide, top,
                            ox * step_x - before, apart_y, apart_x, height, width, pixel,
                            step_x * pixel, out_pixel, zero, least, most, floats,
                            group_bytes + u * lines % (2 * rows) * 64,
                        )  # fmt: skip
                        if not in_matrices or at_once == 0:
                            if taken == largest:
                                many(*given, lines)
                            elif taken == middle:
                                some(*given, lines)
                            else:
                                few(*given, lines)
                        elif registers > 1 and taken > PIXELS:
                            wide_matrix(at_once, *given)
                        else:
                            matrix(at_once, *given)
                    alone = 0
                    if chunk == 0:
                        alone = begin
                    k = 0
                    if chunk > 0:
                        k = k + end
                    if chunk == per_row - 1:
                        alone = out_width
                    while k < alone:
                        if k == begin:
                            k = end
                        if k < alone:
                            one(
                                w + g * group_bytes, source, to + k * out_pixel,
                                tail + g * rows * TAIL, outside, quads, tall, wide, top,
                                k * step_x - before, apart_y, apart_x, height, width, pixel,
                                step_x * pixel, out_pixel, zero, least, most, floats, ahead,
                                2 * rows,
                            )  # fmt: skip
                        k += 1
            if in_matrices and at_once > 0:
                matrix_end()

        return groups

    at_once = pixels_at_once(target)
    four, two, single = (tiles_of(rows, at_once[rows]) for rows in (4, 2, 1))

    def convolution_u8(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        y = arg_ptr(args, 2)
        tail = arg_ptr(args, 3)
        tile_bytes = arg_int(args, 13) * arg_int(args, 14) * arg_int(args, 5) * 64
        n_tiles = arg_int(args, 6)
        wrote = 16 + 48 * smaller(arg_int(args, 25), 1)
        fours = n_tiles // 4
        if arg_int(args, 25) != 0:
            fours = 0
        twos = (n_tiles - fours * 4) // 2
        four(args, thread, n_threads, fours, w, y, tail)
        done = fours * 4
        two(
            args, thread, n_threads, twos, w + done * tile_bytes, y + done * wrote,
            tail + done * TAIL,
        )  # fmt: skip
        done = done + twos * 2
        single(
            args, thread, n_threads, n_tiles - done, w + done * tile_bytes, y + done * wrote,
            tail + done * TAIL,
        )  # fmt: skip

    return convolution_u8


# --- references and cases -------------------------------------------------------------------------


SHAPES: Sequence[tuple[Geometry, int, int]] = (  # channels read and written
    (Geometry(1, (1, 31), (1, 31), (1, 1)), 24, 40),
    (Geometry(2, (5, 17), (5, 17), (3, 3), pads=(1, 1)), 3, 16),
    (Geometry(1, (9, 33), (5, 17), (3, 3), (2, 2), (1, 1)), 16, 112),
    (Geometry(1, (4, 3), (4, 3), (5, 5), pads=(2, 2)), 32, 32),
    (Geometry(1, (9, 31), (5, 27), (3, 3), dilations=(2, 2)), 17, 130),
    (Geometry(1, (1, 1), (1, 1), (1, 1)), 64, 100),
    (Geometry(1, (1, 45), (1, 45), (1, 1)), 384, 80),
    (Geometry(1, (7, 37), (7, 37), (3, 3), pads=(1, 1)), 80, 80),
    (Geometry(1, (1, 39), (1, 39), (1, 1)), 68, 112),
    (Geometry(1, (1, 18), (1, 18), (1, 1)), 128, 32),
    (Geometry(1, (1, 16), (1, 16), (1, 1)), 132, 80),
)


def random_weights(
    rng: np.random.Generator, shape: tuple[int, ...], sums_to: float
) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights with extreme ones, and scales so that results have about `sums_to` as size."""
    import numpy as np

    w = rng.integers(-127, 128, shape).astype(np.int8)
    w.reshape(-1)[:2] = -127, 127
    terms = max(1, w[..., 0].size)
    scale = rng.uniform(0.5, 2, shape[-1]) * sums_to / (127 * 73 * terms**0.5)
    return w, scale.astype(np.float32)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (geometry, read, written) in enumerate(SHAPES):
        of = Quantised(0.02, (0, 128, 255)[i % 3])
        to = Quantised(0.03, (128, 0, 3)[i % 3], *((0, 255) if i % 2 else (7, 200)))
        floats, bytes_read = i in (3, 5, 6, 9, 10), pixel_bytes(read)
        x = rng.integers(0, 256, (geometry.images, *geometry.read, bytes_read), dtype=np.uint8)
        x[0, 0, 0], x[0, -1, -1] = 255, 0
        w, scale = random_weights(rng, (*geometry.taps, read, written), 100)
        bias = rng.integers(-(2**20), 2**20, written).astype(np.int32)
        weight_scales = (scale * 0.03 / 0.02).astype(np.float32)
        scale = scales(of, weight_scales, 1.0 if floats else to.scale)
        sums = w.astype(np.int64).sum((0, 1, 2))
        exact = reference(x[..., :read].astype(np.float64) - of.zero, w, geometry) + bias
        shape = (geometry.images, *geometry.written)
        tiles = -(-written // TILE_ROWS)
        y = np.full((*shape, tiles * TILE_ROWS), 99, np.float32 if floats else np.uint8)
        expected = np.full_like(y, 0 if floats else max(to.least, to.zero))
        if floats:
            more = rng.standard_normal(written).astype(np.float32)
            expected[..., :written] = exact.astype(np.int32).astype(np.float32) * scale + more
        else:
            expected[..., :written] = requantised(exact, scale, to)
        zero, least, most = rounding_slots(to)
        ends = tails(folded_bias(bias, sums, of.zero), scale, sums, floats)
        if floats:
            ends[:, 3] = (
                np.pad(more, (0, tiles * TILE_ROWS - written)).view(np.int32).reshape(tiles, -1)
            )
        slots = [
            tiled_weights(w, floats), x, y, ends,
            np.full(bytes_read, of.zero, np.uint8), -(-read // QUAD), tiles, most,
            *geometry.slots(bytes_read, y.itemsize * tiles * TILE_ROWS), zero, least, int(floats),
            i // 2 % 2,
        ]  # fmt: skip
        yield Case(slots, [(y, expected)], 0, f"{geometry}, {read} to {written}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (
        __name__, "headrace.sparse.format", "headrace.kernels.requantise",
        "headrace.kernels.byte_matrix", "headrace.kernels.geometry", "headrace.kernels.weights_u8",
    )  # fmt: skip
    return [Kernel("convolution_u8", _dense, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
