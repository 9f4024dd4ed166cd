"""The end of a network's training step: gradients of losses, and updates of weights.

Losses are multiplied by a scale, so that gradients do not vanish in halves. Five float32 in SRAM,
the state, are the scale, one over it, the number of steps since it changed, 1 behind an overflow,
else 0, and the number of steps with one: where a gradient is not finite, nothing is updated, and
the scale is halved. After so many good steps it is doubled (Micikevicius et al., "Mixed Precision
Training", 1710.03740).

A trained half has a second half beside it, of what is lost in rounding: both have 22 bits, so that
small updates add up, in the place of a float32 beside a half. Updates are computed in float32 on
all chips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.numbers import KINDS, Kind, Numbers, dtype_of, numbers_of
from headrace.targets.fp16 import SINGLE, Arithmetic
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    f32,
    fma,
    get_f32,
    ptr_to_int,
    put_f32,
    smaller,
    splat_f32,
    stack_bytes,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction, same_for_all
from headrace.targets.target import Target

LOSS: dict[Kind, str] = {kind: f"loss_{kind}" for kind in KINDS}
FINITE: dict[Kind, str] = {kind: f"finite_{kind}" for kind in KINDS}
UPDATE: dict[Kind, str] = {kind: f"update_{kind}" for kind in KINDS}
RESCALE = "rescale"
LEAST_SCALE, MOST_SCALE = 2.0**-10, 2.0**24


def first_state(scale: float) -> np.ndarray:
    """The state in front of the first step; the scale is a power of two."""
    return np.array([scale, 1 / scale, 0, 0, 0], np.float32)


def skipped_of(state: np.ndarray) -> int:
    """Steps so far that changed nothing, as a gradient was not finite."""
    return int(state[4])


def _loss(numbers: Numbers) -> KernelFunction:
    load, store, put, get = numbers.load, numbers.store, numbers.put, numbers.get
    size, lanes = numbers.bytes, numbers.lanes

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        """Slots: what came, what is wanted, the gradient, elements, the state, a factor."""
        y, t, c, n = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_int(args, 3)
        scale = splat_f32(get_f32(arg_ptr(args, 4)) * arg_float(args, 5))
        place = stack_bytes(64)
        for i in range(0, n, lanes):
            store(place, (load(y + i * size, 1, 0) - load(t + i * size, 1, 0)) * scale, 0)
            for j in range(smaller(lanes, n - i)):
                put(c + (i + j) * size, get(place + j * size))

    return with_lanes(kernel, lanes)


def loss_reference(
    numbers: Numbers, y: np.ndarray, t: np.ndarray, state: np.ndarray, factor: float
) -> np.ndarray:
    """The gradient of a loss: (y - t) * (scale * factor)."""
    of = Arithmetic(SINGLE)
    return numbers.stored(of.multiply(of.subtract(y, t), of.multiply(state[0], np.float32(factor))))


def _finite(numbers: Numbers) -> KernelFunction:
    load, store, get, zeros = numbers.load, numbers.store, numbers.get, numbers.zeros
    size, lanes = numbers.bytes, numbers.lanes

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        """Slots: an array, its elements, the state."""
        x, n, state = arg_ptr(args, 0), arg_int(args, 1), arg_ptr(args, 2)
        sums, zero = zeros(1), zeros(1)
        end = x + (n & -lanes) * size
        while ptr_to_int(x) != ptr_to_int(end):
            sums = fma(load(x, 1, 0), zero, sums)  # 0 times infinity is NaN
            x = x + lanes * size
        place = stack_bytes(64)
        store(place, sums, 0)
        bad = get_f32(state + 12)
        for i in range(lanes):
            bad = bad + get(place + i * size)
        for i in range(n & (lanes - 1)):
            bad = bad + get(x + i * size) * f32(0.0)
        if bad != 0.0:
            put_f32(state + 12, f32(1.0))

    return with_lanes(kernel, lanes)


def finite_reference(x: np.ndarray, state: np.ndarray) -> None:
    """Make the state's last number 1 if some element is not finite."""
    if not np.isfinite(x).all():
        state[3] = 1


def _update(numbers: Numbers) -> KernelFunction:
    load, store, get, put = numbers.load, numbers.store, numbers.get, numbers.put
    size, lanes, halves = numbers.bytes, numbers.lanes, numbers.kind == "half"
    width = lanes * size

    def step(
        w: Any, rest: Any, v: Any, g: Any, to: Any, to_rest: Any, to_v: Any, inverse: Any,
        rate: Any, momentum: Any,
    ) -> None:  # fmt: skip
        velocity = fma(momentum, load(v, 1, 0), load(g, 1, 0) * inverse)
        before = load(w, 1, 0)
        if halves:
            before = before + load(rest, 1, 0)
        after = fma(rate, velocity, before)
        store(to_v, velocity, 0)
        store(to, after, 0)
        if halves:
            store(to_rest, after - load(to, 1, 0), 0)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        """Slots: weights, their rests, velocities, gradients, elements, state, -rate, momentum.

        Of float32 there are no rests; with no momentum velocities are written over gradients.
        """
        w, rest, v, g = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_ptr(args, 3)
        n, state = arg_int(args, 4), arg_ptr(args, 5)
        inverse = splat_f32(get_f32(state + 4))
        rate, momentum = splat_f32(arg_float(args, 6)), splat_f32(arg_float(args, 7))
        if get_f32(state + 12) == 0.0:
            end = w + (n & -lanes) * size
            while ptr_to_int(w) != ptr_to_int(end):
                step(w, rest, v, g, w, rest, v, inverse, rate, momentum)
                w, rest, v, g = w + width, rest + width, v + width, g + width
            left = n & (lanes - 1)
            if left > 0:
                place = stack_bytes(64)
                step(w, rest, v, g, place, place + width, place + 2 * width, inverse, rate,
                     momentum)  # fmt: skip
                for i in range(left):
                    put(w + i * size, get(place + i * size))
                    put(v + i * size, get(place + (2 * width + i * size)))
                    if halves:
                        put(rest + i * size, get(place + (width + i * size)))

    return with_lanes(kernel, lanes)


def update_reference(
    numbers: Numbers, w: np.ndarray, rest: np.ndarray | None, v: np.ndarray, g: np.ndarray,
    state: np.ndarray, rate: float, momentum: float,
) -> None:  # fmt: skip
    """Update weights, their rests and velocities in place."""
    if state[3] != 0:
        return
    of = numbers.arithmetic
    velocity = of.fma(np.float32(momentum), v, of.multiply(g, state[1]))
    before = of.operand(w) if rest is None else of.add(w, rest)
    after = of.fma(np.float32(rate), velocity, before)
    v[...] = numbers.stored(velocity)
    w[...] = numbers.stored(after)
    if rest is not None:
        rest[...] = numbers.stored(of.subtract(after, w))


def _rescale(args: Any, thread: Any, n_threads: Any) -> None:
    """Slots: the state, good steps after which the scale is doubled."""
    state, interval = arg_ptr(args, 0), arg_float(args, 1)
    scale, inverse = get_f32(state), get_f32(state + 4)
    good = get_f32(state + 8) + f32(1.0)
    if get_f32(state + 12) == 0.0:
        if good >= interval:
            good = f32(0.0)
            if scale < f32(MOST_SCALE):
                scale, inverse = scale * f32(2.0), inverse * f32(0.5)
    else:
        good = f32(0.0)
        put_f32(state + 16, get_f32(state + 16) + f32(1.0))
        if scale > f32(LEAST_SCALE):
            scale, inverse = scale * f32(0.5), inverse * f32(2.0)
    put_f32(state, scale)
    put_f32(state + 4, inverse)
    put_f32(state + 8, good)
    put_f32(state + 12, f32(0.0))


def rescale_reference(state: np.ndarray, interval: float) -> None:
    """Change the state behind a step."""
    scale, _, good, bad, skipped = (float(one) for one in state)
    good += 1
    if bad != 0:
        scale, good, skipped = (scale / 2 if scale > LEAST_SCALE else scale), 0, skipped + 1
    elif good >= interval:
        scale, good = (scale * 2 if scale < MOST_SCALE else scale), 0
    state[:] = scale, 1 / scale, good, 0, skipped


def _loss_cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    numbers = numbers_of(target, kind, wide=True)
    for n in (1, 4, 10):
        y, t = rng.random((2, n)).astype(dtype_of(kind))
        c, state = np.zeros_like(y), first_state(1024)
        expected = loss_reference(numbers, y, t, state, 0.5)
        yield Case([y, t, c, n, state, 0.5], [(c, expected)], 0, f"{n}")


def _finite_cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for n in (3, 17, 40):
        for bad in (None, np.inf, -np.inf, np.nan):
            x = rng.standard_normal(n).astype(dtype_of(kind))
            if bad is not None:
                x[rng.integers(n)] = bad
            state = first_state(8)
            expected = state.copy()
            finite_reference(x, expected)
            yield Case([x, n, state], [(state, expected)], 0, f"{n} {bad}")


def _update_cases(kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    numbers, dtype = numbers_of(target, kind, wide=True), dtype_of(kind)
    for n in (1, 8, 19):
        for bad in (0.0, 1.0):
            w, v, g = rng.standard_normal((3, n)).astype(dtype)
            rest = (w * 2.0**-12).astype(dtype)
            state = first_state(16)
            state[3] = bad
            expected = [one.copy() for one in (w, rest, v)]
            of_half = expected[1] if kind == "half" else None
            update_reference(numbers, expected[0], of_half, expected[2], g, state, -0.1, 0.9)
            block = [w, rest, v, g, n, state, -0.1, 0.9]
            yield Case(block, list(zip((w, rest, v), expected, strict=True)), 0, f"{n} {bad}")


def _rescale_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    for good, bad in ((0, 0.0), (8, 0.0), (9, 0.0), (5, 1.0)):
        for scale in (1024.0, LEAST_SCALE, MOST_SCALE):
            state = first_state(scale)
            state[2:4] = good, bad
            expected = state.copy()
            rescale_reference(expected, 10.0)
            yield Case([state, 10.0], [(state, expected)], 0, f"{scale} {good} {bad}")


def _build(
    make: Callable[[Numbers], KernelFunction], kind: Kind, wide: bool, target: Target
) -> KernelFunction:
    return make(numbers_of(target, kind, wide=wide))


def all_kernels() -> list[Kernel]:
    """Losses, checks and updates for each kind of number, and one for scales."""
    rows = [
        Kernel(
            names[kind],
            partial(_build, make, kind, wide),
            (__name__, numbers_of.__module__),
            partial(cases, kind),
        )
        for names, make, cases, wide in (
            (LOSS, _loss, _loss_cases, True),
            (FINITE, _finite, _finite_cases, False),
            (UPDATE, _update, _update_cases, True),
        )
        for kind in KINDS
    ]
    return [*rows, Kernel(RESCALE, same_for_all(_rescale), (__name__,), _rescale_cases)]
