"""What experts without a feed-forward say (MoE++, 2410.07348): nothing, their input, or a mix of
that and a constant.

Their outputs lie in the rows of the choices where those of other experts do, so that `combine` of
`headrace.kernels.experts` adds all in the order of the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.math import exp
from headrace.kernels.prepare import inverse_rms
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    fma,
    get_i64,
    int_to_ptr,
    load_f32,
    splat_f32,
    store_f32,
    sum_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, same_for_all
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

EXPERTS = 11  # slots of what is said of each of them
ZERO, COPY, CONSTANT = range(3)


def zero_computation(args: Any, thread: Any, n_threads: Any) -> None:
    """Write the outputs of choices of experts without a feed-forward; threads share tokens.

    Slots: 0 chosen experts (int64 [tokens][active]), 1 active, 2 number of the first expert of this
    kind, 3 address of the token count, 4 rows before their norm (float32), 5 bytes between them,
    6 weights of the norm, scaled as experts read them, 7 values, 8 eps of the norm, 9 outputs of
    choices (float32 rows), 10 bytes of a row; then for each expert: what it is, and, of `CONSTANT`
    ones, the address of two rows whose products with the input weigh it (one behind the
    other), and of the constant.
    """
    active = arg_int(args, 1)
    first = arg_int(args, 2)
    n = arg_int(args, 7)
    count = get_i64(arg_ptr(args, 3))
    for token in range(count * thread // n_threads, count * (thread + 1) // n_threads):
        for k in range(active):
            choice = token * active + k
            expert = get_i64(arg_ptr(args, 0) + choice * 8) - first
            if expert >= 0:
                x = arg_ptr(args, 4) + token * arg_int(args, 5)
                w = arg_ptr(args, 6)
                out = arg_ptr(args, 9) + choice * arg_int(args, 10)
                said = args + (EXPERTS + 3 * expert) * 8
                kind = get_i64(said)
                scale = splat_f32(inverse_rms(x, n, arg_float(args, 8)))
                of_x = zeros_f32(1)
                if kind != ZERO:
                    of_x = splat_f32(1.0)
                of_constant = zeros_f32(1)
                constant = w  # any readable row, where there is none
                if kind == CONSTANT:
                    mix = int_to_ptr(get_i64(said + 8))
                    constant = int_to_ptr(get_i64(said + 16))
                    one = zeros_f32(1)
                    two = zeros_f32(1)
                    for at in range(0, n * 4, 64):
                        v = load_f32(x + at, 1, 0) * scale * load_f32(w + at, 1, 0)
                        one = fma(v, load_f32(mix + at, 1, 0), one)
                        two = fma(v, load_f32(mix + (n * 4 + at), 1, 0), two)
                    above = splat_f32(sum_f32(one)) - splat_f32(sum_f32(two))
                    of_x = splat_f32(1.0) / (splat_f32(1.0) + exp(zeros_f32(1) - above))
                    of_constant = splat_f32(1.0) / (splat_f32(1.0) + exp(above))
                for at in range(0, n * 4, 64):
                    v = load_f32(x + at, 1, 0) * scale * load_f32(w + at, 1, 0)
                    more = of_constant * load_f32(constant + at, 1, 0)
                    store_f32(out + at, fma(of_x, v, more), 0)


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for tokens, active, n, first in ((1, 2, 32, 3), (7, 2, 80, 1), (4, 1, 48, 0)):
        kinds = (CONSTANT, CONSTANT, COPY, ZERO)
        chosen = rng.integers(0, first + 4, (tokens, active))
        chosen[0, 0] = first
        x = (rng.standard_normal((tokens, n)) * 3).astype(np.float32)
        w = rng.standard_normal(n).astype(np.float32)
        mix = rng.standard_normal((4, 2 * n)).astype(np.float32)
        mix[1] *= 50  # one of two is all
        constants = rng.standard_normal((4, n)).astype(np.float32)
        eps = 1e-5
        found = np.full((tokens * active, n), 7.0, np.float32)
        expected = found.copy()
        for i, expert in enumerate((chosen - first).ravel().tolist()):
            if expert < 0:
                continue
            v = x[i // active].astype(np.float64)
            v = v / np.sqrt((v * v).mean() + eps) * w
            a = mix[expert].reshape(2, n).astype(np.float64) @ v
            a = np.exp(a - a.max()) / np.exp(a - a.max()).sum()
            mixed = a[0] * v + a[1] * constants[expert]
            expected[i] = {ZERO: 0 * v, COPY: v, CONSTANT: mixed}[kinds[expert]]
        table = [s for i, kind in enumerate(kinds) for s in (kind, mix[i], constants[i])]
        slots = [
            chosen, active, first, np.array([tokens], np.int64), x, n * 4, w, n, eps, found, n * 4,
            *table,
        ]  # fmt: skip
        near = np.abs(expected) * 1e-5 + 1e-5
        yield Case(slots, [(found, expected)], near, f"{tokens} x {active}, {n} values")


def kernel() -> Kernel:
    """The row of the kernel."""
    sources = (__name__, "headrace.kernels.math", "headrace.kernels.prepare")
    return Kernel(
        "experts_zero_computation", same_for_all(zero_computation), sources, _cases, __name__
    )


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    return [kernel()]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
