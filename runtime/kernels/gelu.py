"""GELU of a whole value, in its exact and its tanh form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp, gelu_tanh
from headrace.targets.simd import (
    absolute,
    arg_int,
    arg_ptr,
    fma,
    load_f32,
    minimum,
    select_lt,
    splat_f32,
    store_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np


def erf(x: Any) -> Any:
    """The error function, within 1.5 units of the last place.

    Two minimax polynomials after Norbert Juffa's `erff`: x + x p(x**2) near 0, else
    1 - e**q(|x|), with x's sign.
    """
    t = absolute(x)
    s = x * x
    near = fma(splat_f32(-5.96761703e-4), s, splat_f32(4.99119423e-3))
    near = fma(near, s, splat_f32(-2.67681349e-2))
    near = fma(near, s, splat_f32(1.12819925e-1))
    near = fma(near, s, splat_f32(-3.76125336e-1))
    near = fma(near, s, splat_f32(1.28379166e-1))
    near = fma(near, x, x)
    far = fma(splat_f32(-1.72853470e-5), t, splat_f32(3.83197126e-4))
    more = fma(splat_f32(-3.88396438e-3), t, splat_f32(2.42546219e-2))
    far = fma(far, s, more)
    far = fma(far, t, splat_f32(-1.06777877e-1))
    far = fma(far, t, splat_f32(-6.34846687e-1))
    far = fma(far, t, splat_f32(-1.28717512e-1))
    far = fma(far, t, splat_f32(0.0) - t)
    # Beyond 4 it is 1: there the polynomial may do as it likes.
    far = splat_f32(1.0) - exp(minimum(far, splat_f32(0.0)))
    far = select_lt(t, splat_f32(4.0), far, splat_f32(1.0))
    far = select_lt(x, splat_f32(0.0), splat_f32(0.0) - far, far)
    return select_lt(t, splat_f32(0.927734375), near, far)


def gelu(x: Any) -> Any:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): x / 2 * (1 + erf(x / sqrt(2)))."""
    return splat_f32(0.5) * x * (splat_f32(1.0) + erf(x * splat_f32(0.7071067811865476)))


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
                [1.3120, -1.3120, 5.6, -5.6, 40, -40, 1, -1],  # where forms change
            ]
        ).astype(np.float32)  # fmt: skip
        y = np.full(x.size, np.nan, np.float32)
        with np.errstate(over="ignore"):
            expected = reference(x.astype(np.float64))
        # 1 + erf is off by some units of 1, however small it is.
        bound = np.abs(x.astype(np.float64)) * 2.0**-22 + 1e-37
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
