"""Activations that are quantised as they come, turned for products with sparse weights.

The codes are those of `dynamic_u8`. They lie in panels of 64 rows (tokens): [panel][channel][64],
in which byte 16j + 4v + i is the code of row 16v + 4j + i, as `interleave4` takes four channels
apart to vectors of 16 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.dynamic_u8 import SMALL, ends_of, quotient, scale_and_zero, write_tails
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    interleave4,
    load_f32,
    load_turned,
    load_u8,
    repeat,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    store_u8,
    to_bytes,
)
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

PANEL = 64  # rows; channels that are turned at once, too
SCRATCH = 2 * PANEL * PANEL  # bytes for each thread


def columns_bytes(rows: int, channels: int) -> int:
    """Of all panels of so many rows."""
    return -(-rows // PANEL) * PANEL * channels


def _columns() -> KernelFunction:
    def of(divides: bool) -> Any:
        def quantised(p: Any, scale: Any, inverse: Any, zero: Any) -> Any:
            """64 numbers as bytes: what `to_bytes` makes of their quotients by scale."""
            x = load_f32(p, 4, 64)
            if divides:
                found = x / repeat(splat_f32(scale), 4)
            else:
                negative = repeat(splat_f32(0.0 - scale), 4)
                found = quotient(x, negative, repeat(splat_f32(inverse), 4))
            return to_bytes(found, splat_i32(zero), splat_i32(0), splat_i32(255))

        def block(
            x: Any, row_bytes: Any, rows: Any, to: Any, spare: Any, scale: Any, inverse: Any,
            zero: Any,
        ) -> None:  # fmt: skip
            """64 rows of 64 channels; rows that are not there are the last one again."""
            there = smaller(rows, PANEL)
            for t in range(there):
                store_u8(spare + t * PANEL, quantised(x + t * row_bytes, scale, inverse, zero))
            last = load_u8(spare + (there - 1) * PANEL, 1, 0)
            for t in range(there, PANEL):
                store_u8(spare + t * PANEL, last)
            # Words of 4 channels: [16 rows][word] to [word][16 rows].
            turned = spare + PANEL * PANEL
            for g in range(4):
                words = load_turned(spare + g * (16 * PANEL), PANEL)
                store_f32(turned + g * (16 * PANEL), words, PANEL)
            for word in range(16):
                four = load_u8(turned + word * PANEL, 4, 16 * PANEL)
                four = interleave4(interleave4(four))  # the other way around is twice this way
                channel = to + (word % 4 * 16 + word // 4 * 4) * PANEL
                store_u8(channel, four)

        return block

    divided, multiplied = of(True), of(False)

    def columns(args: Any, thread: Any, n_threads: Any) -> None:
        """Rows of float32 as panels of bytes, and what their product with int8 weights ends with.

        Slots: those of `dynamic_u8.quantise_rows`, but 4 is not used, and 11 scratch of `SCRATCH`
        bytes for each thread. Rows have at least 64 elements with their pads. Threads share the
        blocks of 64 rows and channels, and the tiles.
        """
        x = arg_ptr(args, 0)
        y = arg_ptr(args, 1)
        rows = arg_int(args, 2)
        padded = arg_int(args, 3)
        spare = arg_ptr(args, 11) + thread * SCRATCH
        scale, zero = scale_and_zero(arg_ptr(args, 5), n_threads)
        inverse = 1.0 / scale
        blocks = (padded + PANEL - 1) // PANEL
        units = (rows + PANEL - 1) // PANEL * blocks
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            panel = u // blocks
            c = smaller((u - panel * blocks) * PANEL, padded - PANEL)
            first = panel * PANEL
            source = x + (first * padded + c) * 4
            to = y + (first * padded + c * PANEL)
            if scale < SMALL:
                divided(source, padded * 4, rows - first, to, spare, scale, inverse, zero)
            else:
                multiplied(source, padded * 4, rows - first, to, spare, scale, inverse, zero)
        write_tails(args, thread, n_threads, scale, zero)

    return columns


def in_columns(codes: np.ndarray) -> np.ndarray:
    """Codes [rows, channels] as they lie: [panels, channels, 64]; what fills up is the last row."""
    import numpy as np

    panels = -(-len(codes) // PANEL)
    at = np.minimum(np.arange(panels * PANEL), len(codes) - 1)
    split = codes[at].reshape(panels, 4, 4, 4, codes.shape[1])  # [panel][v][j][i][channel]
    found: np.ndarray = split.transpose(0, 4, 2, 1, 3).reshape(panels, codes.shape[1], PANEL)
    return np.ascontiguousarray(found)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    shapes = ((70, 144, 2, 1.0), (5, 64, 1, 1e-3), (64, 80, 3, 0.0), (3, 96, 1, 1e-34))
    for rows, padded, tiles, spread in shapes:
        x = (rng.standard_normal((rows, padded)) * spread).astype(np.float32)
        x[0, :4] = x.max(), x.min(), 0, x.max() / 3
        y = np.zeros(columns_bytes(rows, padded), np.uint8)
        codes, ends, expected = ends_of(x, tiles, rng)
        slots = [x, y, rows, padded, 0, *ends, np.zeros(8 * SCRATCH, np.uint8)]
        tails = ends[-1]
        yield Case(
            slots, [(y, in_columns(codes).reshape(-1)), (tails, expected)], 0,
            f"{rows}x{padded} about {spread}",
        )  # fmt: skip


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.dynamic_u8", "headrace.kernels.images_u8")
    return [Kernel("dynamic_columns", same_for_all(_columns()), sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
