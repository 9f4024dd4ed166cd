"""Sums and products of two arrays and functions of each element, and their gradients.

Vectors go over an array; the last one ends with it, and reads before what is overwritten, so the
result may lie in the place of what is read. Of arrays shorter than a vector elements are stored
one by one. Exponentials are `exponential`'s, in float32 on all chips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from headrace.micro.kernels.numbers import (
    KINDS,
    Kind,
    Numbers,
    constants_of,
    dtype_of,
    numbers_of,
    some_not_finite,
)
from headrace.micro.kernels.softmax import exponential, exponential_reference
from headrace.targets.fp16 import Arithmetic, Values
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    maximum,
    minimum,
    ptr_to_int,
    select_lt,
    splat_f32,
    stack_bytes,
    with_lanes,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

Bounds = tuple[float, float]
STACK = 64


@dataclass(frozen=True)
class Elementwise:
    """A function of the elements in the same place of two arrays.

    Attributes:
        compute: (numbers) -> the function of vectors (a, b, first, second, zero); first and second
            are two constants of a layer, such as its bounds, in all lanes.
        reference: (numbers, a, b, constants) -> exact results.
        reads: arrays: 1 or 2.
        wide: in float32 on all chips.
        constants: of the tests.
    """

    compute: Callable[[Numbers], Callable[..., Any]]
    reference: Callable[[Numbers, Values, Values, Bounds], Values]
    reads: int
    wide: bool = False
    constants: Bounds = (0.0, 6.0)


def _add(numbers: Numbers) -> Callable[..., Any]:
    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        return minimum(high, maximum(a + b, low))

    return fn


def _multiply(numbers: Numbers) -> Callable[..., Any]:
    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        return minimum(high, maximum(a * b, low))

    return fn


def _bounds(numbers: Numbers) -> Callable[..., Any]:
    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        return minimum(high, maximum(a, low))

    return fn


def _within(numbers: Numbers) -> Callable[..., Any]:
    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        return select_lt(low, b, select_lt(b, high, a, zero), zero)

    return fn


def _leaky_relu(numbers: Numbers) -> Callable[..., Any]:
    def fn(a: Any, b: Any, slope: Any, unused: Any, zero: Any) -> Any:
        return select_lt(a, zero, a * slope, a)

    return fn


def _hard_sigmoid(numbers: Numbers) -> Callable[..., Any]:
    splat = numbers.splat

    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        x = minimum(splat(6.0), maximum(a + splat(3.0), zero))
        return minimum(high, maximum(x * splat(1 / 6), low))

    return fn


def _hard_swish(numbers: Numbers) -> Callable[..., Any]:
    splat = numbers.splat

    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        x = minimum(splat(6.0), maximum(a + splat(3.0), zero))
        return minimum(high, maximum(a * (x * splat(1 / 6)), low))

    return fn


def _sigmoid(numbers: Numbers) -> Callable[..., Any]:
    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        one = splat_f32(1.0)
        small = exponential(minimum(a, zero - a))
        x = one / (one + small)
        return minimum(high, maximum(select_lt(a, zero, small * x, x), low))

    return fn


def _tanh(numbers: Numbers) -> Callable[..., Any]:
    def fn(a: Any, b: Any, low: Any, high: Any, zero: Any) -> Any:
        one = splat_f32(1.0)
        least = minimum(a, zero - a)
        small = exponential(least + least)
        x = (one - small) / (one + small)
        return minimum(high, maximum(select_lt(a, zero, zero - x, x), low))

    return fn


def _clamped(n: Numbers, x: Values, bounds: Bounds) -> Values:
    low, high = constants_of(n, bounds)
    x = np.where(x < low, low, x)
    return np.where(high < x, high, x)


def _relu6_sixth(n: Numbers, a: Values) -> Values:
    of = n.arithmetic
    x = _clamped(n, of.add(a, 3.0), (0.0, 6.0))
    return of.multiply(x, of.round(np.float32(1 / 6)))


def divided(of: Arithmetic, a: Values, b: Values) -> Values:
    """a / b: float64 has more than twice the digits of float32, so that rounding twice is right."""
    return of.round(a / b)


def _sigmoid_reference(n: Numbers, a: Values, b: Values, bounds: Bounds) -> Values:
    of = n.arithmetic
    small = exponential_reference(-np.abs(a))
    x = divided(of, np.ones_like(a), of.add(1.0, small))
    return _clamped(n, np.where(a < 0, of.multiply(small, x), x), bounds)


def _tanh_reference(n: Numbers, a: Values, b: Values, bounds: Bounds) -> Values:
    of = n.arithmetic
    least = -np.abs(a)
    small = exponential_reference(of.add(least, least))
    x = divided(of, of.subtract(1.0, small), of.add(1.0, small))
    return _clamped(n, np.where(a < 0, of.subtract(0.0, x), x), bounds)


def _within_reference(n: Numbers, a: Values, b: Values, bounds: Bounds) -> Values:
    low, high = constants_of(n, bounds)
    return np.where((low < b) & (b < high), a, 0.0)


OPERATIONS: dict[str, Elementwise] = {
    "add": Elementwise(_add, lambda n, a, b, c: _clamped(n, n.arithmetic.add(a, b), c), 2),
    "multiply": Elementwise(
        _multiply, lambda n, a, b, c: _clamped(n, n.arithmetic.multiply(a, b), c), 2
    ),
    "identity": Elementwise(_bounds, lambda n, a, b, c: _clamped(n, a, c), 1),
    # The gradient a of what is within bounds, of the bounded b.
    "within": Elementwise(_within, _within_reference, 2),
    "leaky_relu": Elementwise(
        _leaky_relu,
        lambda n, a, b, c: np.where(a < 0, n.arithmetic.multiply(a, constants_of(n, c)[0]), a),
        1, constants=(0.125, 0.0),
    ),
    "hard_sigmoid": Elementwise(
        _hard_sigmoid, lambda n, a, b, c: _clamped(n, _relu6_sixth(n, a), c), 1
    ),
    "hard_swish": Elementwise(
        _hard_swish,
        lambda n, a, b, c: _clamped(n, n.arithmetic.multiply(a, _relu6_sixth(n, a)), c), 1,
        constants=(-np.inf, np.inf),
    ),
    "sigmoid": Elementwise(_sigmoid, _sigmoid_reference, 1, True, (-np.inf, np.inf)),
    "tanh": Elementwise(_tanh, _tanh_reference, 1, True, (-np.inf, np.inf)),
}  # fmt: skip


def name_of(operation: str, kind: Kind) -> str:
    """The kernel's."""
    return f"{operation}_{kind}"


def _kernel(numbers: Numbers, operation: Elementwise) -> KernelFunction:
    load, store, splat, zeros = numbers.load, numbers.store, numbers.splat, numbers.zeros
    get, put, size, lanes = numbers.get, numbers.put, numbers.bytes, numbers.lanes
    width, compute = lanes * size, operation.compute(numbers)

    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        a, b, c, n = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_int(args, 3)
        first, second = splat(arg_float(args, 4)), splat(arg_float(args, 5))
        if n < lanes:
            x = compute(load(a, 1, 0), load(b, 1, 0), first, second, zeros(1))
            place = stack_bytes(STACK)
            store(place, x, 0)
            for i in range(n):
                put(c + i * size, get(place + i * size))
        else:
            rest = (n - lanes) * size
            last = compute(load(a + rest, 1, 0), load(b + rest, 1, 0), first, second, zeros(1))
            behind, end = c + rest, ptr_to_int(c + rest)
            while ptr_to_int(c) < end:
                x = compute(load(a, 1, 0), load(b, 1, 0), first, second, zeros(1))
                store(c, x, 0)
                a, b, c = a + width, b + width, c + width
            store(behind, last, 0)

    return with_lanes(kernel, lanes)


def reference(
    operation: str, numbers: Numbers, a: np.ndarray, b: np.ndarray, constants: Bounds
) -> np.ndarray:
    """What a chip makes of two arrays of one shape."""
    of = numbers.arithmetic
    a, b = of.operand(a), of.operand(b)
    return numbers.stored(OPERATIONS[operation].reference(numbers, a, b, constants))


def arithmetic_of(target: Target, kind: Kind, operation: str) -> Numbers:
    """What a chip computes an operation in."""
    return numbers_of(target, kind, wide=OPERATIONS[operation].wide)


def _cases(operation: str, kind: Kind, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    numbers, dtype = arithmetic_of(target, kind, operation), dtype_of(kind)
    constants = OPERATIONS[operation].constants
    for n in (1, 3, 8, 13, 40):
        for in_place in (False, True):
            a, b = (8 * rng.standard_normal((2, n))).astype(dtype)
            if n > 8:
                some_not_finite(rng, a, b)
            if n == 40:
                a[:7] = np.array([np.inf, 65504, -65504, 2e-7, -6e-8, 0, -0.0], dtype)
            expected = reference(operation, numbers, a, b, constants)
            c = a if in_place else np.zeros_like(a)
            yield Case([a, b, c, n, *constants], [(c, expected)], 0, f"{n} in place: {in_place}")


def _build(operation: str, kind: Kind, target: Target) -> KernelFunction:
    return _kernel(arithmetic_of(target, kind, operation), OPERATIONS[operation])


def all_kernels() -> list[Kernel]:
    """Each for each kind of number."""
    return [
        Kernel(
            name_of(name, kind),
            partial(_build, name, kind),
            (__name__, numbers_of.__module__, exponential.__module__),
            partial(_cases, name, kind),
        )
        for name in OPERATIONS
        for kind in KINDS
    ]
