"""Images whose channels get factors and summands that depend on all pixels: norms of images.

GroupNorm (Wu and He 2018, arXiv:1803.08494) and InstanceNorm (1607.08022), and the response norm of
ConvNeXt V2 (2301.00808). Mean and sum of squares around it are formed of blocks of pixels, each in
two passes while it is in the first cache, and put together as Chan, Golub and LeVeque (1979) do.
Means are sums of differences from a first value: what is the same everywhere is its mean, exactly,
and large means cost no digits. Results do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.kernels.finishes import (
    INFINITE,
    NONE,
    SILU,
    Finish,
    activated,
    error_bound,
    reference,
)
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    fma,
    get_f32,
    iota_i32,
    load_f32,
    maximum,
    minimum,
    put_f32,
    repeat,
    select_lt,
    splat_f32,
    splat_i32,
    sqrt,
    square_root,
    store_f32,
    sum_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

BLOCK = 64  # pixels


def moments(args: Any, thread: Any, n_threads: Any) -> None:
    """Of each channel in each block of pixels: its mean, and the sum of squares around that.

    Slots: 0 x, 1 y [images][blocks][2][16 vectors], 2 images, 3 pixels of one, 4 vectors of 16 of a
    pixel, 5 bytes between pixels of x. Threads share the blocks, each up to 64 channels of one.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    pixels = arg_int(args, 3)
    vectors = arg_int(args, 4)
    step = arg_int(args, 5)
    blocks = (pixels + (BLOCK - 1)) // BLOCK
    chunks = (vectors + 3) // 4
    units = arg_int(args, 2) * blocks * chunks
    for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
        block = u // chunks
        chunk = (u - block * chunks) * 4
        image = block // blocks
        first = (block - image * blocks) * BLOCK
        count = _of_block(pixels, first)
        p = x + ((image * pixels + first) * step + chunk * 64)
        to = y + (block * vectors * 128 + chunk * 64)
        share = splat_f32(1.0) / splat_f32(count)
        if vectors - chunk >= 4:
            base = load_f32(p, 4, 64)
            total = zeros_f32(4)
            for i in range(1, count):
                total = total + (load_f32(p + i * step, 4, 64) - base)
            mean = fma(total, repeat(share, 4), base)
            squares = zeros_f32(4)
            for i in range(count):
                apart = load_f32(p + i * step, 4, 64) - mean
                squares = fma(apart, apart, squares)
            store_f32(to, mean, 64)
            store_f32(to + vectors * 64, squares, 64)
        else:
            for v in range(vectors - chunk):
                first_one = load_f32(p + v * 64, 1, 0)
                one = zeros_f32(1)
                for i in range(1, count):
                    one = one + (load_f32(p + (i * step + v * 64), 1, 0) - first_one)
                middle = fma(one, share, first_one)
                around = zeros_f32(1)
                for i in range(count):
                    away = load_f32(p + (i * step + v * 64), 1, 0) - middle
                    around = fma(away, away, around)
                store_f32(to + v * 64, middle, 0)
                store_f32(to + (vectors + v) * 64, around, 0)


def normalise(args: Any, thread: Any, n_threads: Any) -> None:
    """What makes (x - mean) / sqrt(variance + epsilon) * weight + bias: see `scale_images`.

    Slots: 0 moments, 1 weight and 2 bias of channels, 3 y [images][3][padded], 4 images, 5 pixels
    of one, 6 channels, 7 padded (to 16), 8 channels of a group, which have mean and variance
    together, 9 epsilon (float32). Pads of y become zero. Threads share the images.
    """
    weight = arg_ptr(args, 1)
    bias = arg_ptr(args, 2)
    pixels = arg_int(args, 5)
    channels = arg_int(args, 6)
    row = arg_int(args, 7) * 4
    each = arg_int(args, 8)
    epsilon = arg_float(args, 9)
    blocks = (pixels + (BLOCK - 1)) // BLOCK
    images = arg_int(args, 4)
    for image in range(images * thread // n_threads, images * (thread + 1) // n_threads):
        x = arg_ptr(args, 0) + image * blocks * 2 * row
        y = arg_ptr(args, 3) + image * 3 * row
        for at in range(0, row, 64):
            base = load_f32(x + at, 1, 0)
            total = zeros_f32(1)
            for b in range(1, blocks):
                count = splat_f32(_of_block(pixels, b * BLOCK))
                total = fma(load_f32(x + (b * 2 * row + at), 1, 0) - base, count, total)
            mean = base + total / splat_f32(pixels)
            squares = _squares(x + at, row, pixels, mean)
            store_f32(y + at, mean, 0)
            store_f32(y + (row + at), squares, 0)
            store_f32(y + (2 * row + at), load_f32(bias + at, 1, 0), 0)
            if each == 1:
                spread = square_root(squares / splat_f32(pixels) + splat_f32(epsilon))
                there = iota_i32() + splat_i32(at // 4)
                scale = load_f32(weight + at, 1, 0) / spread
                store_f32(
                    y + (row + at), select_lt(there, splat_i32(channels), scale, zeros_f32(1)), 0
                )
                store_f32(y + at, select_lt(there, splat_i32(channels), mean, zeros_f32(1)), 0)
        if each > 1:
            for first in range(0, channels, each):
                begin = get_f32(y + first * 4)
                middle = 0.0
                for c in range(first, first + each):
                    middle = middle + (get_f32(y + c * 4) - begin)
                middle = begin + middle / each
                around = 0.0
                for c in range(first, first + each):
                    away = get_f32(y + c * 4) - middle
                    around = around + get_f32(y + (row + c * 4)) + away * away * pixels
                factor = 1.0 / sqrt(around / (pixels * each) + epsilon)
                for c in range(first, first + each):
                    put_f32(y + c * 4, middle)
                    put_f32(y + (row + c * 4), get_f32(weight + c * 4) * factor)
            for c in range(channels, row // 4):
                put_f32(y + c * 4, 0.0)
                put_f32(y + (row + c * 4), 0.0)


def respond(args: Any, thread: Any, n_threads: Any) -> None:
    """What makes x + x n weight + bias: see `scale_images`.

    n is a channel's length over all pixels by that of all channels in the mean (and epsilon).
    Slots: those of `normalise`; 8 is not read. Threads share the images.
    """
    weight = arg_ptr(args, 1)
    bias = arg_ptr(args, 2)
    pixels = arg_int(args, 5)
    channels = arg_int(args, 6)
    row = arg_int(args, 7) * 4
    epsilon = arg_float(args, 9)
    blocks = (pixels + (BLOCK - 1)) // BLOCK
    images = arg_int(args, 4)
    for image in range(images * thread // n_threads, images * (thread + 1) // n_threads):
        x = arg_ptr(args, 0) + image * blocks * 2 * row
        y = arg_ptr(args, 3) + image * 3 * row
        total = zeros_f32(1)
        for at in range(0, row, 64):
            squares = _squares(x + at, row, pixels, zeros_f32(1))
            there = iota_i32() + splat_i32(at // 4)
            length = select_lt(there, splat_i32(channels), square_root(squares), zeros_f32(1))
            store_f32(y + at, length, 0)
            total = total + length
        whole = splat_f32(sum_f32(total) / channels + epsilon)
        for at in range(0, row, 64):
            share = load_f32(y + at, 1, 0) / whole
            scale = fma(share, load_f32(weight + at, 1, 0), splat_f32(1.0))
            store_f32(y + at, zeros_f32(1), 0)
            store_f32(y + (row + at), scale, 0)
            store_f32(y + (2 * row + at), load_f32(bias + at, 1, 0), 0)


def scale_images(args: Any, thread: Any, n_threads: Any) -> None:
    """y = clamp(activation((x - mean) scale + shift) ... + more), pixel by pixel.

    The mean is taken away first: what is the same everywhere becomes zero, and not what is left of
    two large numbers.

    Slots: 0 x, 1 y, 2 means, scales and shifts [images][3][16 vectors], 3 more (0: nothing is
    added), 4 images, 5 pixels of one, 6 vectors of 16 of a pixel, 7 to 9 bytes between pixels of x,
    y and more, 10 least and 11 most value, 12 to 16 `Finish`. Threads share the pixels.
    """
    more = arg_ptr(args, 3)
    adds = arg_int(args, 3) != 0
    pixels = arg_int(args, 5)
    vectors = arg_int(args, 6)
    least = splat_f32(arg_float(args, 10))
    most = splat_f32(arg_float(args, 11))
    kind = arg_int(args, 12)
    alpha = splat_f32(arg_float(args, 13))
    beta = splat_f32(arg_float(args, 14))
    scale = splat_f32(arg_float(args, 15))
    shift = splat_f32(arg_float(args, 16))
    n = arg_int(args, 4) * pixels
    for i in range(n * thread // n_threads, n * (thread + 1) // n_threads):
        factors = arg_ptr(args, 2) + i // pixels * vectors * 192
        p = arg_ptr(args, 0) + i * arg_int(args, 7)
        q = arg_ptr(args, 1) + i * arg_int(args, 8)
        for at in range(0, vectors * 64, 64):
            times = load_f32(factors + (vectors * 64 + at), 1, 0)
            apart = load_f32(p + at, 1, 0) - load_f32(factors + at, 1, 0)
            v = fma(apart, times, load_f32(factors + (vectors * 128 + at), 1, 0))
            if kind != NONE:
                v = fma(activated(v, kind, alpha, beta), scale, shift)
            if adds:
                v = v + load_f32(more + (i * arg_int(args, 9) + at), 1, 0)
            # In this order what is no number stays none.
            store_f32(q + at, minimum(most, maximum(v, least)), 0)


def _squares(x: Any, row: Any, pixels: Any, middle: Any) -> Any:
    """Of differences from some value: moments of blocks put together, a vector of channels."""
    squares = zeros_f32(1)
    for b in range((pixels + (BLOCK - 1)) // BLOCK):
        count = splat_f32(_of_block(pixels, b * BLOCK))
        apart = load_f32(x + b * 2 * row, 1, 0) - middle
        squares = squares + load_f32(x + (b * 2 * row + row), 1, 0)
        squares = fma(apart * apart, count, squares)
    return squares


def _of_block(pixels: Any, first: Any) -> Any:
    """How many pixels a block has that begins there."""
    count = pixels - first
    if count > BLOCK:
        count = BLOCK
    return count


# --- references and cases -------------------------------------------------------------------------

# Images, pixels, channels, channels of a group, how far the mean is from zero.
_SHAPES = ((2, 5, 20, 1, 3.0), (1, 150, 96, 8, 1e3), (3, 64, 64, 64, 0.0), (1, 129, 33, 3, 1.0))


def _image(rng: np.random.Generator, images: int, pixels: int, n: int, away: float) -> np.ndarray:
    """With pads that are no numbers."""
    import numpy as np

    x = np.full((images, pixels, -(-n // 16) * 16), np.nan, np.float32)
    spread = rng.uniform(0.1, 2.0, n)
    x[..., :n] = rng.standard_normal((images, pixels, n)) * spread + away
    return x


def _moments_of(x: np.ndarray) -> np.ndarray:
    """As the kernel has them, in float64."""
    import numpy as np

    found = []
    for first in range(0, x.shape[1], BLOCK):
        block = x[:, first : first + BLOCK].astype(np.float64)
        mean = block.mean(1)
        found.append(np.stack([mean, ((block - mean[:, None]) ** 2).sum(1)], 1))
    return np.stack(found, 1)


def _moment_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for images, pixels, n, _, away in _SHAPES:
        x = np.nan_to_num(_image(rng, images, pixels, n, away))
        expected = _moments_of(x)
        y = np.full(expected.shape, np.nan, np.float32)
        size = np.abs(x).max(initial=1.0) * 2.0**-24 * 80
        bound = np.zeros(expected.shape)
        bound[:, :, 0] = size
        bound[:, :, 1] = expected[:, :, 1] * 1e-5 + BLOCK * size**2 + 1e-30
        slots = [x, y, images, pixels, x.shape[-1] // 16, x.strides[1]]
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{x.shape}")


def _factors(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, each: int, epsilon: float
) -> list[np.ndarray]:
    """Of a group norm, in float64: means, scales and shifts."""
    import numpy as np

    images, pixels, n = x.shape
    groups = x.astype(np.float64).reshape(images, pixels, n // each, each)
    scale = weight / np.sqrt(groups.var((1, 3)) + epsilon).repeat(each, 1)
    return [groups.mean((1, 3)).repeat(each, 1), scale, np.broadcast_to(bias, scale.shape)]


def _responses(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, each: int, epsilon: float
) -> list[np.ndarray]:
    import numpy as np

    length = np.sqrt((x.astype(np.float64) ** 2).sum(1))
    scale = 1 + length / (length.mean(1, keepdims=True) + epsilon) * weight
    return [0 * scale, scale, np.broadcast_to(bias, scale.shape)]


def _factor_cases(of: Any, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for images, pixels, n, each, away in _SHAPES:
        x, epsilon = _image(rng, images, pixels, n, away), 1e-5
        padded = x.shape[-1]
        weight, bias = np.zeros((2, padded), np.float32)
        weight[:n], bias[:n] = rng.standard_normal((2, n))
        expected = np.zeros((images, 3, padded))
        expected[..., :n] = np.stack(of(x[..., :n], weight[:n], bias[:n], each, epsilon), 1)
        y = np.full(expected.shape, np.nan, np.float32)
        # Means are off by a few units, a group's spread by as much, and its factor in proportion.
        off, narrow = 2.0**-21, np.ones((images, n))
        bound = np.abs(expected) * 2.0**-20 + 1e-30
        if of is _factors:
            off *= 1 + float(np.abs(x[..., :n]).max())
            narrow = np.abs(expected[:, 1, :n] / weight[:n])
            bound[:, 0, :n] += off
        else:
            expected[:, 1, n:], bound[:, 1] = 1, 2.0**-20 * (2 + np.abs(expected[:, 1]))
        bound[:, 1, :n] += np.abs(expected[:, 1, :n]) * off * narrow
        slots = [
            _moments_of(x).astype(np.float32), weight, bias, y, images, pixels, n, padded, each,
            epsilon,
        ]  # fmt: skip
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{x.shape} by {each}")


def _scale_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, finish in enumerate((Finish(NONE), Finish(SILU), Finish(NONE))):
        images, pixels, n, gap = 1 + i, 5, 16 + 16 * i, 16 * i
        x = rng.standard_normal((images, pixels, n + gap)).astype(np.float32)
        factors = rng.standard_normal((images, 3, n)).astype(np.float32)
        more = rng.standard_normal((images, pixels, n)).astype(np.float32)
        y = np.full((images, pixels, n + 16), 7, np.float32)
        low, high = (0.0, 1.5) if i == 2 else (-INFINITE, INFINITE)
        mean, scale, shift = factors[:, None].astype(np.float64).transpose(2, 0, 1, 3)
        inner = (x[..., :n] - mean) * scale + shift
        found = reference(inner, finish)
        expected = y.astype(np.float64)
        expected[..., :n] = np.clip(found + (more if i else 0), low, high)
        bound = np.full(y.shape, 1e-6)
        bound[..., :n] += error_bound(inner, finish)
        slots = [
            x, y, factors, more if i else 0, images, pixels, n // 16, x.strides[1], y.strides[1],
            more.strides[1], low, high, *finish.slots(),
        ]  # fmt: skip
        yield Case(slots, [(y, expected.astype(np.float32))], bound, f"{finish}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    rows: tuple[tuple[str, Any, Any], ...] = (
        ("images_moments", moments, _moment_cases),
        ("moments_normalise", normalise, partial(_factor_cases, _factors)),
        ("moments_respond", respond, partial(_factor_cases, _responses)),
        ("images_scale", scale_images, _scale_cases),
    )
    sources = (__name__, "headrace.kernels.finishes", "headrace.kernels.math")
    return [Kernel(name, same_for_all(of), sources, cases, __name__) for name, of, cases in rows]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
