"""What can be done to values before they are stored: an activation, a factor, a sum, bounds.

`Finish` says which; kernels that make images call `finished` with its slots, and `map_images` is
one pass over memory that does nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp_down, tanh
from headrace.targets.simd import (
    absolute,
    arg_float,
    arg_int,
    arg_ptr,
    fma,
    load_f32,
    maximum,
    minimum,
    select_lt,
    splat_f32,
    square_root,
    store_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

INFINITE = float("inf")  # a bound that bounds nothing
NONE, SIGMOID, SILU, HARD_SIGMOID, HARD_SWISH, LEAKY, SQUARE, ROOT, TANH, MAGNITUDE = range(10)
FINISH_SLOTS = 5
# Sigmoids of less are that of this, 1.6e-28. Those of -88 and below are denormal numbers, which
# take CPUs a hundred times as long: here, and in all products that read them.
LOWEST_GATED = -64.0


@dataclass(frozen=True)
class Finish:
    """y = activation(x) * scale + shift.

    Attributes:
        kind: NONE; SIGMOID; SILU (x sigmoid(x)); HARD_SIGMOID, which is alpha x + beta between 0
            and 1; HARD_SWISH (x times that); LEAKY (alpha x below 0); SQUARE; ROOT; TANH;
            MAGNITUDE.
    """

    kind: int
    alpha: float = 0.0
    beta: float = 0.0
    scale: float = 1.0
    shift: float = 0.0

    def slots(self) -> list[Any]:
        """Of an argument block."""
        return [self.kind, self.alpha, self.beta, self.scale, self.shift]


def activated(v: Any, kind: Any, alpha: Any, beta: Any) -> Any:
    """An activation of `Finish` of one vector; alpha and beta are vectors."""
    found = v
    if kind in (SIGMOID, SILU):
        one = splat_f32(1.0)
        inner = maximum(v, splat_f32(LOWEST_GATED))
        gate = one / (one + exp_down(splat_f32(0.0) - inner))
        found = gate
        if kind == SILU:
            found = inner * gate
    elif kind in (HARD_SIGMOID, HARD_SWISH):
        gate = minimum(splat_f32(1.0), maximum(fma(v, alpha, beta), splat_f32(0.0)))
        found = gate
        if kind == HARD_SWISH:
            found = v * gate
    elif kind == LEAKY:
        found = select_lt(v, splat_f32(0.0), v * alpha, v)
    elif kind == SQUARE:
        found = v * v
    elif kind == ROOT:
        found = square_root(v)
    elif kind == TANH:
        found = tanh(v)
    elif kind == MAGNITUDE:
        found = absolute(v)
    return found


def finished(
    y: Any, more: Any, pixels: Any, vectors: Any, y_step: Any, more_step: Any, kind: Any,
    alpha: Any, beta: Any, scale: Any, shift: Any, adds: Any, least: Any, most: Any,
) -> None:  # fmt: skip
    """Finish what lies at y: y = clamp(activation(y) * scale + shift + more).

    Vectors are 64 bytes apart, however many lanes they have; `more` is read where `adds`.
    """
    a = splat_f32(alpha)
    b = splat_f32(beta)
    s = splat_f32(scale)
    t = splat_f32(shift)
    low = splat_f32(least)
    high = splat_f32(most)
    for i in range(pixels):
        for j in range(vectors):
            p = y + (i * y_step + j * 64)
            v = load_f32(p, 1, 0)
            if kind != NONE:
                v = fma(activated(v, kind, a, b), s, t)
            if adds:
                v = v + load_f32(more + (i * more_step + j * 64), 1, 0)
            store_f32(p, minimum(high, maximum(v, low)), 0)


def map_images(args: Any, thread: Any, n_threads: Any) -> None:
    """y = clamp(activation(x * scale[c] + shift[c]) ...), pixel by pixel. Threads share the pixels.

    Slots: 0 x, 1 y, 2 scales and 3 shifts of channels (0: none), 4 pixels, 5 vectors of 16 of a
    pixel, 6 and 7 bytes between pixels of x and y, 8 least and 9 most value, 10 to 14 `Finish`.
    """
    x = arg_ptr(args, 0)
    y = arg_ptr(args, 1)
    scales = arg_ptr(args, 2)
    shifts = arg_ptr(args, 3)
    scaled = arg_int(args, 2) != 0
    pixels = arg_int(args, 4)
    vectors = arg_int(args, 5)
    x_step = arg_int(args, 6)
    y_step = arg_int(args, 7)
    least = splat_f32(arg_float(args, 8))
    most = splat_f32(arg_float(args, 9))
    kind = arg_int(args, 10)
    alpha = splat_f32(arg_float(args, 11))
    beta = splat_f32(arg_float(args, 12))
    scale = splat_f32(arg_float(args, 13))
    shift = splat_f32(arg_float(args, 14))
    for i in range(pixels * thread // n_threads, pixels * (thread + 1) // n_threads):
        for j in range(vectors):
            v = load_f32(x + (i * x_step + j * 64), 1, 0)
            if scaled:
                v = fma(v, load_f32(scales + j * 64, 1, 0), load_f32(shifts + j * 64, 1, 0))
            if kind != NONE:
                v = fma(activated(v, kind, alpha, beta), scale, shift)
            # In this order what is no number stays none.
            store_f32(y + (i * y_step + j * 64), minimum(most, maximum(v, least)), 0)


# --- references and cases -------------------------------------------------------------------------


def reference(x: np.ndarray, finish: Finish) -> np.ndarray:
    """What `Finish` says, in float64."""
    import numpy as np

    x = x.astype(np.float64)
    if finish.kind == NONE:
        return x
    with np.errstate(over="ignore"):
        soft = 1 / (1 + np.exp(-x))
    hard = np.clip(finish.alpha * x + finish.beta, 0, 1)
    found: np.ndarray = {
        SIGMOID: soft, SILU: x * soft, HARD_SIGMOID: hard, HARD_SWISH: x * hard,
        LEAKY: np.where(x < 0, finish.alpha * x, x), SQUARE: x * x, TANH: np.tanh(x),
        ROOT: np.sqrt(np.maximum(x, 0)), MAGNITUDE: np.abs(x),
    }[finish.kind]  # fmt: skip
    found *= finish.scale
    return found + finish.shift


def error_bound(x: np.ndarray, finish: Finish) -> np.ndarray:
    """How far a kernel may be from `reference` of `x`."""
    import numpy as np

    size = np.abs(x.astype(np.float64)) + 1
    if finish.kind == SQUARE:
        size **= 2
    return size * abs(finish.scale) * 2.0**-20 + abs(finish.shift) * 2.0**-23 + 1e-30


_FINISHES = (
    Finish(NONE), Finish(SIGMOID), Finish(SILU), Finish(HARD_SIGMOID, 0.2, 0.5),
    Finish(HARD_SWISH, 1 / 6, 0.5, 1.5, -0.25), Finish(LEAKY, 0.1),
)  # fmt: skip


def _map_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, finish in enumerate(_FINISHES):
        pixels, vectors, more = 5 + i, 1 + i % 3, 16 * (i % 2)
        n = vectors * 16
        x = (rng.standard_normal((pixels, n + more)) * 4).astype(np.float32)
        x[0, :8] = 0.0, -0.0, 100.0, -100.0, 1e30, -1e30, 3.0, -3.0
        y = np.full((pixels, n + 32), 7, np.float32)
        scales = rng.standard_normal(n).astype(np.float32)
        shifts = rng.standard_normal(n).astype(np.float32)
        low, high = (-1.0, 2.0) if i == 2 else (-INFINITE, INFINITE)
        inner = x[:, :n].astype(np.float64)
        bound = 0.0 * inner
        if i % 2:
            inner = inner * scales + shifts
            bound = (np.abs(x[:, :n] * scales) + np.abs(shifts)) * 2.0**-22
        expected = np.array(y)
        expected[:, :n] = np.clip(reference(inner, finish), low, high)
        whole = np.zeros(y.shape)
        whole[:, :n] = (error_bound(inner, finish) if finish.kind else 1e-30) + bound * 2
        slots = [
            x, y, scales if i % 2 else 0, shifts if i % 2 else 0, pixels, vectors, x.strides[0],
            y.strides[0], low, high, *finish.slots(),
        ]  # fmt: skip
        yield Case(slots, [(y, expected)], whole, f"{finish}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.math")
    return [Kernel("images_map", same_for_all(map_images), sources, _map_cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
