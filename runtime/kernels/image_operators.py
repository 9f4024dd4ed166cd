"""Images that lie pixel by pixel, channels innermost: two of them together, pools and sizes.

Every image may be a part of the channels of another: bytes between its pixels are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.kernels.finishes import INFINITE
from headrace.kernels.geometry import GEOMETRY, Geometry, geometry_of, taps_inside
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    fma,
    get_f32,
    get_i32,
    load_f32,
    maximum,
    minimum,
    select_lt,
    select_nan,
    splat_f32,
    store_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

ADD, SUBTRACT, MULTIPLY, DIVIDE, LARGER, SMALLER, SCALE_AND_ADD = range(7)
MAXIMUM, MEAN, MEAN_WITH_PADS = range(3)


def combine(args: Any, thread: Any, n_threads: Any) -> None:
    """y = clamp(a o b); SCALE_AND_ADD is a + a b. Threads share the pixels.

    Slots: 0 a, 1 b, 2 y, 3 images, 4 pixels of one, 5 vectors of 16 of a pixel, 6 and 7 bytes
    between images and between pixels of a (0: the same for all), 8 and 9 of b, 10 between pixels
    of y, 11 the operation, 12 least and 13 most value.
    """
    a = arg_ptr(args, 0)
    b = arg_ptr(args, 1)
    y = arg_ptr(args, 2)
    images = arg_int(args, 3)
    pixels = arg_int(args, 4)
    vectors = arg_int(args, 5)
    a_image = arg_int(args, 6)
    a_step = arg_int(args, 7)
    b_image = arg_int(args, 8)
    b_step = arg_int(args, 9)
    y_step = arg_int(args, 10)
    what = arg_int(args, 11)
    least = splat_f32(arg_float(args, 12))
    most = splat_f32(arg_float(args, 13))
    infinite = splat_f32(INFINITE)
    lowest = splat_f32(-INFINITE)
    total = images * pixels
    for i in range(total * thread // n_threads, total * (thread + 1) // n_threads):
        image = i // pixels
        p = a + (image * a_image + (i - image * pixels) * a_step)
        q = b + (image * b_image + (i - image * pixels) * b_step)
        for j in range(vectors):
            v = load_f32(p + j * 64, 1, 0)
            w = load_f32(q + j * 64, 1, 0)
            found = v
            if what == ADD:
                found = v + w
            elif what == SUBTRACT:
                found = v - w
            elif what == MULTIPLY:
                found = v * w
            elif what == DIVIDE:
                found = v / w
            elif what == LARGER:
                # What is no number on either side makes none: of such two `maximum` gives the
                # first, `minimum` the second.
                found = select_lt(v, infinite, maximum(w, v), v + maximum(w, zeros_f32(1)))
            elif what == SMALLER:
                found = select_lt(lowest, v, minimum(v, w), v + minimum(zeros_f32(1), w))
            else:
                found = fma(v, w, v)
            store_f32(y + (i * y_step + j * 64), minimum(most, maximum(found, least)), 0)


def pool(args: Any, thread: Any, n_threads: Any) -> None:
    """The largest or the mean of each window. Threads share the rows.

    Slots: 0 x, 1 y, 2 vectors of 16 of a pixel, 3 what, 8 to 22 geometry (`convolution`).
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    vectors = arg_int(args, 2)
    what = arg_int(args, 3)
    (
        images, height, width, out_height, out_width, tall, wide, step_y, step_x, above, before,
        apart_y, apart_x, pixel, out_pixel,
    ) = geometry_of(args)  # fmt: skip
    rows = images * out_height
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        image = row // out_height
        iy = (row - image * out_height) * step_y - above
        ky, ny = taps_inside(iy, apart_y, tall, height)
        source = x + (image * height + iy + ky * apart_y) * width * pixel
        for ox in range(out_width):
            ix = ox * step_x - before
            kx, nx = taps_inside(ix, apart_x, wide, width)
            p = source + (ix + kx * apart_x) * pixel
            count = ny * nx
            if what == MEAN_WITH_PADS:
                count = tall * wide
            factor = splat_f32(1.0) / splat_f32(count)
            for j in range(vectors):
                total = zeros_f32(1)
                if what == MAXIMUM:
                    total = load_f32(p + j * 64, 1, 0)
                for down in range(ny):
                    for across in range(nx):
                        at = (down * apart_y * width + across * apart_x) * pixel + j * 64
                        if what == MAXIMUM:  # NaN, if there is any, wherever it is
                            v = load_f32(p + at, 1, 0)
                            total = select_nan(v, v, maximum(total, v))
                        else:
                            total = total + load_f32(p + at, 1, 0)
                if what != MAXIMUM:
                    total = total * factor
                store_f32(y + ((row * out_width + ox) * out_pixel + j * 64), total, 0)


def resize(args: Any, thread: Any, n_threads: Any) -> None:
    """Pixels of other places: of one each, or of four by their shares. Threads share the rows.

    Slots: 0 x, 1 y, 2 rows and 3 columns that are read (a table each: [3][written], int32 of the
    first and of the second, float32 share of the second), 4 images, 5 and 6 rows and columns of
    x, 7 and 8 of y, 9 vectors of 16 of a pixel, 10 and 11 bytes between pixels of x and y,
    12 whether shares count.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    down = arg_ptr(args, 2)
    across = arg_ptr(args, 3)
    height = arg_int(args, 5)
    width = arg_int(args, 6)
    out_height = arg_int(args, 7)
    out_width = arg_int(args, 8)
    vectors = arg_int(args, 9)
    pixel = arg_int(args, 10)
    out_pixel = arg_int(args, 11)
    shares = arg_int(args, 12) != 0
    rows = arg_int(args, 4) * out_height
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        image = row // out_height
        oy = row - image * out_height
        top = x + (image * height + get_i32(down + oy * 4)) * width * pixel
        low = x + (image * height + get_i32(down + (out_height + oy) * 4)) * width * pixel
        lower = splat_f32(get_f32(down + (2 * out_height + oy) * 4))
        for ox in range(out_width):
            left = get_i32(across + ox * 4) * pixel
            right = get_i32(across + (out_width + ox) * 4) * pixel
            to = y + (row * out_width + ox) * out_pixel
            if shares:
                later = splat_f32(get_f32(across + (2 * out_width + ox) * 4))
                for j in range(vectors):
                    a = load_f32(top + (left + j * 64), 1, 0)
                    b = load_f32(low + (left + j * 64), 1, 0)
                    a = fma(load_f32(top + (right + j * 64), 1, 0) - a, later, a)
                    b = fma(load_f32(low + (right + j * 64), 1, 0) - b, later, b)
                    store_f32(to + j * 64, fma(b - a, lower, a), 0)
            else:
                for j in range(vectors):
                    store_f32(to + j * 64, load_f32(top + (left + j * 64), 1, 0), 0)


# --- references and cases -------------------------------------------------------------------------


def _combine_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    def by(what: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found: np.ndarray = {
            ADD: lambda: a + b, SUBTRACT: lambda: a - b, MULTIPLY: lambda: a * b,
            DIVIDE: lambda: a / b, LARGER: lambda: np.maximum(a, b),
            SMALLER: lambda: np.minimum(a, b), SCALE_AND_ADD: lambda: a + a * b,
        }[what]()  # fmt: skip
        return found

    for what in range(7):
        images, pixels, n = 1 + what % 2, 7, 16 + 16 * (what % 3)
        shape = (images, pixels, n)
        a = (rng.standard_normal(shape) * 4).astype(np.float32)
        kind = what % 3  # b: for each pixel, for each image, for all
        b = rng.standard_normal((images if kind < 2 else 1, 1 if kind else pixels, n)) + 0.1
        b = np.asarray(b, np.float32)
        if what in (LARGER, SMALLER):  # each with each
            odd = np.array([np.nan, np.inf, -np.inf, 3e38, 0], np.float32)
            a[0, 0, :10], b[0, 0, :5], b[0, 0, 5:10] = np.tile(odd, 2), odd, np.roll(odd, 1)
        y = np.full(shape, np.nan, np.float32)
        low, high = (0.0, 3.0) if what == 2 else (-INFINITE, INFINITE)
        expected = np.clip(by(what, a.astype(np.float64), b.astype(np.float64)), low, high)
        slots = [
            a, b, y, images, pixels, n // 16, pixels * n * 4, n * 4,
            b[0].nbytes if kind < 2 else 0, 0 if kind else n * 4, n * 4, what, low, high,
        ]  # fmt: skip
        bound: Any = np.abs(expected) * 2.0**-23 + np.abs(a) * 2.0**-24 + 1e-30
        if what in (LARGER, SMALLER):
            bound = partial(np.array_equal, equal_nan=True)
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"operation {what}")


def _windows(x: np.ndarray, geometry: Geometry, what: int) -> np.ndarray:
    import numpy as np

    (height, width), (rows, columns) = geometry.read, geometry.written
    out = np.zeros((len(x), rows, columns, x.shape[-1]))
    for oy in range(rows):
        for ox in range(columns):
            ys = oy * geometry.strides[0] - geometry.pads[0]
            xs = ox * geometry.strides[1] - geometry.pads[1]
            down = [ys + k * geometry.dilations[0] for k in range(geometry.taps[0])]
            across = [xs + k * geometry.dilations[1] for k in range(geometry.taps[1])]
            seen = x[:, [i for i in down if 0 <= i < height]].astype(np.float64)
            seen = seen[:, :, [i for i in across if 0 <= i < width]]
            count = len(down) * len(across) if what == MEAN_WITH_PADS else seen[0, ..., 0].size
            out[:, oy, ox] = seen.max((1, 2)) if what == MAXIMUM else seen.sum((1, 2)) / count
    return out


def _pool_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    shapes = (
        Geometry(2, (5, 7), (5, 7), (5, 5), (1, 1), (2, 2)),
        Geometry(1, (9, 8), (4, 4), (2, 2), (2, 2)),
        Geometry(1, (6, 6), (3, 3), (3, 3), (2, 2), (1, 1)),
        Geometry(1, (7, 7), (3, 3), (3, 3), (1, 1), (0, 0), (2, 2)),
    )
    for i, geometry in enumerate(shapes):
        n, more = 16 + 16 * (i % 2), 16 * (i % 3)
        x = rng.standard_normal((geometry.images, *geometry.read, n + more)).astype(np.float32)
        x[..., 0] = -abs(x[..., 0]) * 1e30
        for what in (MEAN, MEAN_WITH_PADS, MAXIMUM):
            if what == MAXIMUM:
                places = rng.permutation(x[0, ..., 1].size)[:3]
                x = x.copy()
                x[0, ..., 1].flat[places] = np.nan, np.inf, -np.inf
            y = np.full((geometry.images, *geometry.written, n), np.nan, np.float32)
            expected = _windows(x[..., :n], geometry, what)
            slots = [x, y, n // 16, what, 0, 0, 0, 0, *geometry.slots((n + more) * 4, n * 4)]
            assert len(slots) == GEOMETRY + 15
            bound: Any = partial(np.array_equal, equal_nan=True)
            if what != MAXIMUM:
                bound = _windows(np.abs(x[..., :n]), geometry, what) * 2.0**-19 + 1e-30
            yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{geometry} {what}")


def _resize_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for images, (height, width), (rows, columns), shares in (
        (1, (4, 5), (8, 10), False), (2, (3, 4), (5, 3), True),
    ):  # fmt: skip
        x = rng.standard_normal((images, height, width, 48)).astype(np.float32)
        y = np.full((images, rows, columns, 32), np.nan, np.float32)
        tables, places = [], []
        for size, count in ((height, rows), (width, columns)):
            one, two = rng.integers(0, size, (2, count)).astype(np.int32)
            share = rng.random(count).astype(np.float32)
            tables.append(np.stack([one, two, share.view(np.int32)]).view(np.float32))
            places.append((one, two, share if shares else share * 0))
        (top, low, lower), (left, right, later) = places
        rows_of = [x[:, i, :, :32].astype(np.float64) for i in (top, low)]
        a, b = (
            v[:, :, left] * (1 - later[:, None]) + v[:, :, right] * later[:, None] for v in rows_of
        )
        expected = a * (1 - lower[:, None, None]) + b * lower[:, None, None]
        slots = [
            x, y, *tables, images, height, width, rows, columns, 2, 48 * 4, 32 * 4, int(shares),
        ]  # fmt: skip
        bound = np.full(y.shape, 2.0**-19 * float(np.abs(x).max()) if shares else 0.0)
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{rows}x{columns}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows = (
        ("images_combine", combine, _combine_cases), ("images_pool", pool, _pool_cases),
        ("images_resize", resize, _resize_cases),
    )  # fmt: skip
    sources = (__name__, "headrace.kernels.geometry")
    return [Kernel(name, same_for_all(fn), sources, cases, __name__) for name, fn, cases in rows]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
