"""Sums of convolutions of bytes in registers of matrices, for targets with `byte_matrix`.

A register of activations has 16 pixels side by side, one of weights up to 16 quads of channels of
a tile of outputs (`weights_u8.tiled_weights`): both lie in memory as they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.targets.simd import (
    matrix_dot,
    matrix_load,
    matrix_store,
    matrix_zero,
    prefetch,
)

PIXELS = 16  # of a register
QUADS = 16  # of a register, at most
FEWEST = 4  # quads of a register that are worth it


def quads_at_once(quads: Any) -> Any:
    """How many quads of a tap one product takes, all of them as many; 0: another way is better."""
    steps = (quads + QUADS - 1) // QUADS
    while steps < quads and quads % steps != 0:
        steps += 1
    found = quads // steps
    if found < FEWEST:
        found = 0
    return found


def sums_of(tiles: int, registers: int) -> Callable[..., None]:
    """Sums of `tiles` tiles and 16 * `registers` pixels: at most 4 registers in all.

    They go to `to`, those of a pixel side by side.
    """
    row = tiles * 64

    def sums(
        to: Any, w: Any, x: Any, outside: Any, quads: Any, at_once: Any, tall: Any, wide: Any,
        top: Any, left: Any, apart_y: Any, apart_x: Any, height: Any, width: Any, pixel: Any,
        x_step: Any, ahead: Any,
    ) -> None:  # fmt: skip
        matrix_zero(0)
        if tiles * registers > 1:
            matrix_zero(1)
        if tiles * registers > 2:
            matrix_zero(2)
            matrix_zero(3)
        q = w
        for ky in range(tall):
            iy = top + ky * apart_y
            for kx in range(wide):
                p = outside
                step = 0
                if iy >= 0 and iy < height:
                    p = x + (iy * width + left + kx * apart_x) * pixel
                    step = x_step
                for _ in range(quads // at_once):
                    for i in range(0, at_once - 1, 2):
                        prefetch(q + (ahead + i * row))
                    matrix_load(4, p, step)
                    matrix_load(6, q, row)
                    matrix_dot(0, 4, 6)
                    if tiles > 1:
                        matrix_load(7, q + 64, row)
                        matrix_dot(1, 4, 7)
                    if tiles > 2:
                        matrix_load(6, q + 128, row)
                        matrix_dot(2, 4, 6)
                        matrix_load(7, q + 192, row)
                        matrix_dot(3, 4, 7)
                    if registers > 1:
                        matrix_load(5, p + 16 * step, step)
                        matrix_dot(tiles, 5, 6)
                        if tiles > 1:
                            matrix_dot(tiles + 1, 5, 7)
                    p = p + at_once * 4
                    q = q + at_once * row
        matrix_store(to, 0, row)
        if tiles > 1:
            matrix_store(to + 64, 1, row)
        if tiles > 2:
            matrix_store(to + 128, 2, row)
            matrix_store(to + 192, 3, row)
        if registers > 1:
            matrix_store(to + PIXELS * row, tiles, row)
            if tiles > 1:
                matrix_store(to + (PIXELS * row + 64), tiles + 1, row)

    return sums
