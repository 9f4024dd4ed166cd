"""Products of float32 rows by 4-bit weights (ONNX Runtime's MatMulNBits), which stay packed.

A weight is `d * (code - z)` with a scale and a zero point for each group of inputs. Those of 128
inputs become floats at a time, in the first cache, and are multiplied by all rows.

Tile of 16 rows of weights: for each group 16 scales (float32); for each group 16 zero points
(a byte); then for each 32 inputs 256 bytes, as `headrace.sparse.n_bits` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.convolution import FEW, pixels_at_once
from headrace.sparse.format import TILE_ROWS, interleave, pack_nibbles
from headrace.sparse.n_bits import quantised, weights_of
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_f32,
    by_token,
    fma,
    fma_outer,
    get_f32,
    load_f32,
    load_f32_grid,
    load_i32,
    load_u8_i32,
    shl,
    shr,
    smaller,
    splat_f32,
    store_f32,
    store_f32_grid,
    strip,
    to_f32,
    with_lanes,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

CHUNK = 32  # inputs
BLOCK = 128  # inputs whose weights are floats at a time, in the first cache
RUN = 4  # tiles that rows are multiplied by while they lie in the first cache


def tile_bytes(inputs: int, group: int) -> int:
    """Of 16 rows of weights."""
    return TILE_ROWS * (inputs // group * 5 + inputs // 2)


def tiled(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Tiles of codes uint8 [rows, n], zeros uint8 and scales float32 [rows, n / group]."""
    import numpy as np

    rows, n = codes.shape
    tiles = -(-rows // TILE_ROWS)
    packed = pack_nibbles(codes.reshape(rows, n // CHUNK, CHUNK))
    scale_bytes = np.ascontiguousarray(scales, np.float32)[..., None].view(np.uint8)
    parts = [
        interleave(scale_bytes, ((4, 4),)), interleave(zeros[..., None], ((1, 1),)),
        interleave(packed, ((CHUNK // 2, 4),)),
    ]  # fmt: skip
    return np.concatenate([one.reshape(tiles, -1) for one in parts], axis=1)


def some_tiles(slots: list[Any], first: int, tiles: int) -> list[Any]:
    """The argument block for some tiles, out of that for all."""
    found = [*slots]
    for slot in (2, 3):
        found[slot] += first * TILE_ROWS * 4
    found[7] = tiles
    return found


def scratch_bytes() -> int:
    """What a thread needs, of any target."""
    return BLOCK * RUN * TILE_ROWS * 4


def _kernel(target: Target) -> KernelFunction:
    """y = bias + x w^T, rows by rows.

    Slots: 0 weights (tiles), 1 x, 2 y, 3 bias (16 a tile), 4 rows of x, 5 inputs (a multiple of
    32), 6 inputs of a group (a multiple of 16), 7 tiles, 8 bytes between rows of x, 9 of y,
    10 scratch, 11 its bytes for each thread. Threads share the tiles.
    """
    tiles, most = target.gemm_tiles, pixels_at_once(target)
    lanes = target.lanes("f32")
    strips, wide = TILE_ROWS // lanes, lanes * 4

    def unpacker(take: Any) -> Any:
        def unpack(
            w: Any, first: Any, last: Any, group: Any, groups: Any, x: Any, step: Any
        ) -> Any:
            """Have `take` see a tile's weights of the inputs of some chunks, and what is at x.

            That is `step` bytes further for each input.
            """
            codes = w + (groups * 80 + first * 256)
            zeros = w + groups * 64
            low = zeros_f32(1)
            high = low
            for c in range(first, last):
                g = c * 32 // group
                d = load_f32(w + g * 64, 1, 0)
                z = load_u8_i32(zeros + g * 16, 1, 0)
                g = (c * 32 + 16) // group
                d2 = load_f32(w + g * 64, 1, 0)
                z2 = load_u8_i32(zeros + g * 16, 1, 0)
                x2 = x + 16 * step
                for _ in range(4):  # 4 inputs of low codes, and 4 of high ones
                    v = load_i32(codes, 1, 0)
                    low = take(low, to_f32(shr(shl(v, 28), 28) - z) * d, x)
                    high = take(high, to_f32(shr(shl(v, 24), 28) - z2) * d2, x2)
                    low = take(low, to_f32(shr(shl(v, 20), 28) - z) * d, x + step)
                    high = take(high, to_f32(shr(shl(v, 16), 28) - z2) * d2, x2 + step)
                    low = take(low, to_f32(shr(shl(v, 12), 28) - z) * d, x + 2 * step)
                    high = take(high, to_f32(shr(shl(v, 8), 28) - z2) * d2, x2 + 2 * step)
                    low = take(low, to_f32(shr(shl(v, 4), 28) - z) * d, x + 3 * step)
                    high = take(high, to_f32(shr(v, 28) - z2) * d2, x2 + 3 * step)
                    codes = codes + 64
                    x = x + 4 * step
                    x2 = x2 + 4 * step
                x = x2
            return low + high

        return unpack

    def stored(acc: Any, weights: Any, to: Any) -> Any:
        store_f32(to, weights, 0)
        return acc

    def multiplied(acc: Any, weights: Any, x: Any) -> Any:
        return fma(weights, splat_f32(get_f32(x)), acc)

    unpack, multiply = unpacker(stored), unpacker(multiplied)

    def of(count: int, at_once: int) -> Any:
        sums = count * at_once
        step = at_once * wide

        def some(
            w: Any, inputs: Any, x: Any, x_step: Any, y: Any, y_step: Any, bias: Any, begins: Any
        ) -> None:
            acc = zeros_f32(sums)
            for _ in range(inputs // 4):
                acc = fma_outer(load_f32(w, at_once, wide), bcast_f32(x, count, x_step), acc)
                acc = fma_outer(
                    load_f32(w + step, at_once, wide), bcast_f32(x + 4, count, x_step), acc
                )
                acc = fma_outer(
                    load_f32(w + 2 * step, at_once, wide), bcast_f32(x + 8, count, x_step), acc
                )
                acc = fma_outer(
                    load_f32(w + 3 * step, at_once, wide), bcast_f32(x + 12, count, x_step), acc
                )
                w = w + 4 * step
                x = x + 16
            found = by_token(acc)
            if begins:
                found = found + load_f32_grid(bias, at_once, count, 64, 0)
            else:
                found = found + load_f32_grid(y, at_once, count, 64, y_step)
            store_f32_grid(y, found, count, 64, y_step)

        return some

    def all_tiles(count: int) -> Any:
        several, alone = of(count, tiles), of(count, 1)

        def some(
            w: Any, n_tiles: Any, inputs: Any, x: Any, x_step: Any, y: Any, y_step: Any, bias: Any,
            begins: Any,
        ) -> None:  # fmt: skip
            i = 0
            if tiles > 1:
                while i + tiles <= n_tiles:
                    several(w, inputs, x, x_step, y + i * 64, y_step, bias + i * 64, begins)
                    w = w + inputs * tiles * wide
                    i += tiles
            while i < n_tiles:
                alone(w, inputs, x, x_step, y + i * 64, y_step, bias + i * 64, begins)
                w = w + inputs * wide
                i += 1

        return some

    many, few, one = all_tiles(most), all_tiles(FEW), all_tiles(1)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        rows = arg_int(args, 4)
        inputs = arg_int(args, 5)
        group = arg_int(args, 6)
        n_tiles = arg_int(args, 7)
        x_step = arg_int(args, 8)
        y_step = arg_int(args, 9)
        scratch = arg_ptr(args, 10) + arg_int(args, 11) * thread
        groups = inputs // group
        tile_stride = groups * 80 + inputs * 8
        t = n_tiles * thread // n_threads
        end = n_tiles * (thread + 1) // n_threads
        while t < end:
            run = smaller(end - t, RUN)
            for s in range(strips):
                w = strip(arg_ptr(args, 0) + t * tile_stride, s)
                side = t * 64 + s * wide
                bias = arg_ptr(args, 3) + side
                if rows == 1:  # what becomes a float is multiplied in a register
                    for i in range(run):
                        found = multiply(
                            w + i * tile_stride, 0, inputs // 32, group, groups,
                            arg_ptr(args, 1), 4,
                        )  # fmt: skip
                        found = found + load_f32(bias + i * 64, 1, 0)
                        store_f32(arg_ptr(args, 2) + side + i * 64, found, 0)
                for first in range(0, inputs if rows > 1 else 0, BLOCK):
                    n_inputs = smaller(inputs - first, BLOCK)
                    chunk = first // 32
                    whole = run // tiles * tiles  # of which `tiles` lie side by side
                    for i in range(run):
                        beside = tiles if i < whole else 1
                        to = scratch + i // beside * beside * n_inputs * wide + i % beside * wide
                        unpack(
                            w + i * tile_stride, chunk, chunk + n_inputs // 32, group, groups, to,
                            beside * wide,
                        )  # fmt: skip
                    begins = first == 0
                    r = 0
                    while r < rows:
                        x = arg_ptr(args, 1) + r * x_step + first * 4
                        y = arg_ptr(args, 2) + r * y_step + side
                        n = 1
                        if rows - r >= most:
                            n = most
                            many(scratch, run, n_inputs, x, x_step, y, y_step, bias, begins)
                        elif rows - r >= FEW:
                            n = FEW
                            few(scratch, run, n_inputs, x, x_step, y, y_step, bias, begins)
                        else:
                            one(scratch, run, n_inputs, x, x_step, y, y_step, bias, begins)
                        r += n
            t += run

    return with_lanes(kernel, lanes)


# Rows of x, inputs, outputs, inputs of a group.
_SHAPES = ((1, 64, 50, 16), (3, 96, 16, 32), (23, 160, 150, 32), (6, 256, 33, 256))


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for rows, inputs, outputs, group in _SHAPES:
        w = rng.standard_normal((outputs, inputs)).astype(np.float32)
        w[0] *= 1000
        codes, zeros, scales = quantised(w, group)
        codes[-1], zeros[-1] = rng.integers(0, 16, inputs), rng.integers(0, 16, inputs // group)
        padded = -(-outputs // TILE_ROWS) * TILE_ROWS
        x = rng.standard_normal((rows, inputs)).astype(np.float32)
        bias = np.zeros(padded, np.float32)
        bias[:outputs] = rng.standard_normal(outputs)
        y = np.full((rows, padded), np.nan, np.float32)
        exact = weights_of(codes, zeros, scales).astype(np.float64).T
        expected = np.zeros_like(y)
        expected[:, :outputs] = x @ exact + bias[:outputs]
        bound = np.zeros_like(y)
        bound[:, :outputs] = np.abs(x) @ np.abs(exact) + np.abs(bias[:outputs])
        slots = [
            tiled(codes, zeros, scales), x, y, bias, rows, inputs, group, padded // TILE_ROWS,
            x.strides[0], y.strides[0], np.zeros((8, scratch_bytes()), np.uint8), scratch_bytes(),
        ]  # fmt: skip
        label = f"{rows}x{inputs}x{outputs}, groups of {group}"
        yield Case(slots, [(y, expected)], bound * (inputs + 2) * 2.0**-24, label)


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (
        __name__, "headrace.kernels.convolution", "headrace.sparse.format",
        "headrace.sparse.n_bits",
    )  # fmt: skip
    return [Kernel("product_rows_n4", _kernel, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
