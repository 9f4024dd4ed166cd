"""GELU of a whole value, in its exact and its tanh form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import gelu_tanh
from headrace.targets.simd import (
    absolute,
    arg_int,
    arg_ptr,
    fma,
    load_f32,
    maximum,
    minimum,
    reciprocal,
    select_lt,
    splat_f32,
    store_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def gelu(x: Any) -> Any:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): x / 2 * (1 + erf(x / sqrt(2))).

    erf(t) = t * P(t**2) / Q(t**2), within 2e-8 up to 3.92: a fit by weighted least squares after
    Lawson. All coefficients add up, which keeps rounding small.
    """
    t = x * splat_f32(0.7071067811865476)
    t = maximum(minimum(t, splat_f32(3.92)), splat_f32(-3.92))
    s = t * t
    above = fma(splat_f32(2.0347304e-06), s, splat_f32(0.00028748071))
    below = fma(splat_f32(3.8070663e-05), s, splat_f32(0.0011881267))
    above = fma(above, s, splat_f32(0.0038683731))
    below = fma(below, s, splat_f32(0.015172387))
    above = fma(above, s, splat_f32(0.053060621))
    below = fma(below, s, splat_f32(0.11508505))
    above = fma(above, s, splat_f32(0.19276509))
    below = fma(below, s, splat_f32(0.50416529))
    above = fma(above, s, splat_f32(1.128379))
    below = fma(below, s, splat_f32(1.0))
    half = splat_f32(0.5) * x
    found = fma(half, t * above * reciprocal(below), half)
    # Far from 0 it is x, or nothing.
    return select_lt(splat_f32(5.5), absolute(x), maximum(x, splat_f32(0.0)), found)


def _of(function: Callable[[Any], Any]) -> KernelFunction:
    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        x = arg_ptr(args, 0)
        y = arg_ptr(args, 1)
        vectors = arg_int(args, 2)
        for v in range(vectors * thread // n_threads, vectors * (thread + 1) // n_threads):
            store_f32(y + v * 64, function(load_f32(x + v * 64, 1, 0)), 0)

    kernel.__doc__ = "y = GELU(x). Slots: 0 x, 1 y, 2 vectors of 16. Threads share the vectors."
    return kernel


def _exact(x: np.ndarray) -> np.ndarray:
    import math

    import numpy as np

    erf = np.array([math.erf(v / math.sqrt(2)) for v in x.tolist()])
    found: np.ndarray = x / 2 * (1 + erf)
    return found


def _by_tanh(x: np.ndarray) -> np.ndarray:
    import numpy as np

    found: np.ndarray = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return found


def _cases(reference: Callable[[np.ndarray], np.ndarray]) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        x = np.concatenate(
            [
                np.linspace(-12, 12, 992), rng.standard_normal(256),
                [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38],
                [5.5, -5.5, 5.6, -5.6, 40, -40, 1, -1],  # where forms change
            ]
        ).astype(np.float32)  # fmt: skip
        y = np.full(x.size, np.nan, np.float32)
        with np.errstate(over="ignore"):
            expected = reference(x.astype(np.float64))
        # 1 + erf is off by some units of 1, however small it is.
        bound = np.abs(x.astype(np.float64)) * 3 * 2.0**-23 + 1e-37
        yield Case([x, y, x.size // 16], [(y, expected.astype(np.float32))], bound, "a range")

    return cases


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.kernels.math")
    rows = (
        ("gelu_erf_f32", gelu, _exact), ("gelu_tanh_f32", gelu_tanh, _by_tanh),
    )  # fmt: skip
    return [
        Kernel(name, same_for_all(_of(function)), sources, _cases(reference), __name__)
        for name, function, reference in rows
    ]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
