"""What kernels mean: the same functions run as plain Python over the same memory."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace.errors import KernelError
from headrace.targets.compiler import compile_kernel
from headrace.targets.emulation.machines import NATIVE
from headrace.targets.emulation.run import run
from headrace.targets.host import pick_target
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    get_f32,
    get_i64,
    load_f32,
    put_f32,
    put_i64,
    repeat,
    store_f32,
    zeros_f32,
)

WORDS = 64
FLAG, COUNT, HALF = True, 5, 0.5


class Address:
    """An address for Python: an array, and how many bytes in."""

    def __init__(self, data: np.ndarray[Any, Any], at: int = 0) -> None:
        self.data, self.at = data.view(np.uint8), at

    def __add__(self, n_bytes: int) -> Address:
        return Address(self.data, self.at + n_bytes)

    def cell(self, kind: Any) -> np.ndarray[Any, Any]:
        view: np.ndarray[Any, Any] = self.data[self.at :][: np.dtype(kind).itemsize].view(kind)
        return view


def _put(kind: Any) -> Callable[[Address, Any], None]:
    def put(at: Address, value: Any) -> None:
        at.cell(kind)[0] = value

    return put


MEANING = {
    "arg_ptr": lambda args, slot: Address(args[slot]),
    "get_i64": lambda at: int(at.cell(np.int64)[0]),
    "get_f32": lambda at: at.cell(np.float32)[0],
    "put_i64": _put(np.int64),
    "put_f32": _put(np.float32),
}


def in_python(fn: Callable[..., None]) -> Callable[..., Any]:
    """The function with markers and callees that work on arrays."""

    def convert(value: Any) -> Any:
        if not isinstance(value, types.FunctionType):
            return value
        return MEANING.get(value.__name__) or in_python(value)

    names = {
        name: convert(fn.__globals__[name])
        for name in fn.__code__.co_names
        if name in fn.__globals__
    }
    cells = tuple(types.CellType(convert(cell.cell_contents)) for cell in fn.__closure__ or ())
    scope = {**fn.__globals__, **names}
    return types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, cells)


def arithmetic(args: Any, thread: Any, n_threads: Any) -> None:
    x, y = arg_ptr(args, 0), arg_ptr(args, 1)
    a = get_i64(x)
    b = get_i64(x + 8)
    put_i64(y, a + b)
    put_i64(y + 8, a - b * 3)
    put_i64(y + 16, a // b)
    put_i64(y + 24, a % b)
    put_i64(y + 32, a // 16)
    put_i64(y + 40, a % 16)
    put_i64(y + 48, (a & b) | (a ^ 255))
    put_i64(y + 56, -a)
    put_i64(y + 64, b << 3)
    put_i64(y + 72, a >> 2)
    put_i64(y + 80, b // -7)
    put_i64(y + 88, b % -7)
    put_i64(y + 96, ~a)
    put_i64(y + 104, COUNT // 2 + 7 % 4)


def absolute(v: Any) -> Any:
    if v < 0:
        return -v
    return v


def sign(v: Any, least: Any = 0) -> Any:
    if v == least:
        return 0
    if v < least:
        return -1
    return 1


def larger_and_smaller(a: Any, b: Any) -> Any:
    if a < b:
        return b, a
    return a, b


def branches(args: Any, thread: Any, n_threads: Any) -> None:
    x, y = arg_ptr(args, 0), arg_ptr(args, 1)
    for i in range(8):
        v = get_i64(x + i * 8)
        w = get_i64(x + (i * 8 + 8))
        at = y + i * 64
        put_i64(at, absolute(v))
        put_i64(at + 8, sign(v))
        put_i64(at + 16, sign(v, 3))
        both = v, w
        big, small = larger_and_smaller(*both)
        put_i64(at + 24, big - small)
        kind = 0
        if v > 0 and w > 0:
            kind = 1
        elif v > 0 or w > 0:
            kind = 2
        put_i64(at + 32, kind)
        put_i64(at + 40, v if not v < w else w * 2)
        if v % 2 == 0:
            late = v // 2
        else:
            late = 3 * v + 1
            kind += 10
        put_i64(at + 48, late + kind)
        if v in (1, -4, 6):
            put_i64(at + 56, 1)
        if v not in (1, 2) and kind not in (7, v):
            put_i64(at + 56, get_i64(at + 56) + 2)


def loops(args: Any, thread: Any, n_threads: Any) -> None:
    x, y = arg_ptr(args, 0), arg_ptr(args, 1)
    total = 0
    last = 0
    for i in range(2, 30, 3):
        total += i
        last = i
    put_i64(y, total)
    put_i64(y + 8, last)
    for _ in range(0):
        total = total * 0
    for i in range(5, 2, 2):
        total = i
    put_i64(y + 16, total)
    a = 0
    b = 1
    while b < 1000:
        a, b = b, a + b
    put_i64(y + 24, a)
    put_i64(y + 32, b)
    found = 0
    first = 0
    for i in range(7):
        v = get_i64(x + i * 8)
        left = i
        while left > 0:
            if v > 3 * left:
                found += left
            left -= 1
        if i == 0:
            first = v
        found = found + first
    put_i64(y + 40, found)
    n = 4
    step = 0
    for _ in range(3):
        step = n
        n = step + 1
    put_i64(y + 48, n)
    many = COUNT
    while many > 2:
        many -= 2
        for k in range(many):
            n += k
        for k in range(many, many + 2):
            n += k * 2
    put_i64(y + 56, n * 100 + many)
    for i in range(3):
        again = get_i64(x + i * 8)
        for k in range(2):
            again = get_f32(x + (i * 8 + k * 4))  # a name for another value
            if again > 0.0:
                n += 1
        put_i64(y + (64 + i * 8), n)


def decides(args: Any, thread: Any, n_threads: Any) -> None:
    # What `and` and `or` do not come to is not read: address 0 is no memory.
    x, y = arg_ptr(args, 0), arg_ptr(args, 1)
    n = 0
    while n < 4 and get_i64(x + n * 8) != 6:
        n += 1
    put_i64(y, n)
    if (FLAG and n == 2) or n > 100:
        put_i64(y + 8, 1)
    if not FLAG or n == 3:
        put_i64(y + 16, 1)
    if not (FLAG and COUNT == 5):
        unknown_name(x)  # noqa: F821


def floats(args: Any, thread: Any, n_threads: Any) -> None:
    x, y = arg_ptr(args, 0), arg_ptr(args, 1)
    total = 0.0  # float64, as Python's
    for i in range(4):
        total += get_f32(x + i * 4) * HALF
    put_f32(y, total)
    v = get_f32(x)
    for _ in range(3):
        v = v * 0.1
    put_f32(y + 4, v)
    w = 1
    for _ in range(3):
        w = w / 3
    put_f32(y + 8, w)
    put_f32(y + 12, get_f32(x + 4) + float("inf"))
    put_f32(y + 16, 1 / 3 + get_f32(x))


def made(width: int, pair: bool, what: Callable[[Any], Any] | None) -> Callable[..., None]:
    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        x, y = arg_ptr(args, 0), arg_ptr(args, 1)
        if pair:
            put_i64(y, width * 2)
        else:
            put_i64(y + 8, width)
        n = 2 if pair else 3
        if what is not None:
            n = what(get_i64(x)) + n
        put_i64(y + 16, n)

    return kernel


KERNELS = {
    "arithmetic": arithmetic,
    "branches": branches,
    "loops": loops,
    "decides": decides,
    "made": made(3, False, None),
    "made_pair": made(4, True, absolute),
    "made_sign": made(4, False, lambda v: v * 2),
}


def natively(fn: Callable[..., None], slots: list[Any]) -> None:
    target = pick_target(None)
    run("try", compile_kernel(fn, target, "try"), target, NATIVE, [(slots, 1)])


@pytest.mark.parametrize("name", KERNELS)
def test_integers_are_those_of_python(name: str) -> None:
    rng = np.random.default_rng(1)
    for low in (-9, -(10**12)):
        x = rng.integers(low, -low, WORDS)
        x[x == 0] = 1
        x[2] = 6
        found, expected = np.zeros(WORDS, np.int64), np.zeros(WORDS, np.int64)
        natively(KERNELS[name], [x, found])
        in_python(KERNELS[name])([x, expected], 0, 1)
        assert np.array_equal(found, expected)
        assert expected.any()


def test_floats_are_those_of_numba() -> None:
    x = np.random.default_rng(2).standard_normal(8).astype(np.float32)
    found = np.zeros(8, np.float32)
    natively(floats, [x, found])
    v, third = np.float64(x[0]), 1.0
    for _ in range(3):
        v, third = v * 0.1, third / 3
    halves = [np.float64(one) * HALF for one in x[:4]]
    expected = [sum(halves[1:], halves[0]), v, third, np.inf, 1 / 3 + np.float64(x[0])]
    assert np.array_equal(found[:5], np.array(expected, np.float32))


def test_blocks_of_vectors_pass_through_loops_and_branches() -> None:
    def kernel(args: Any, thread: Any, n_threads: Any) -> None:
        x, y = arg_ptr(args, 0), arg_ptr(args, 1)
        acc = repeat(zeros_f32(1), 2)
        for i in range(arg_int(args, 2)):
            one = load_f32(x, 2, 64)
            if i % 2 == 0:
                acc = acc + one
            else:
                one = one * one
                acc = acc + one
        store_f32(y, acc, 64)

    x = np.random.default_rng(3).standard_normal(32).astype(np.float32)
    found = np.zeros(32, np.float32)
    natively(kernel, [x, found, 3])
    assert np.array_equal(found, x + x * x + x)


def undefined(args: Any, thread: Any, n_threads: Any) -> None:
    put_i64(arg_ptr(args, 0), nothing)  # noqa: F821


def several(args: Any, thread: Any, n_threads: Any) -> None:
    put_i64(arg_ptr(args, 0), sign())


def changing(args: Any, thread: Any, n_threads: Any) -> None:
    acc = zeros_f32(1)
    for _ in range(3):
        acc = repeat(acc, 2)
    store_f32(arg_ptr(args, 0), acc, 64)


def downwards(args: Any, thread: Any, n_threads: Any) -> None:
    for i in range(3, 0, -1):
        put_i64(arg_ptr(args, 0), i)


def leaving(args: Any, thread: Any, n_threads: Any) -> None:
    for i in range(3):
        if i == 2:
            break


def open_count(args: Any, thread: Any, n_threads: Any) -> None:
    store_f32(arg_ptr(args, 0), repeat(zeros_f32(1), thread), 64)


def mixed(args: Any, thread: Any, n_threads: Any) -> None:
    put_f32(arg_ptr(args, 0), zeros_f32(1) + 1)


def carried(args: Any, thread: Any, n_threads: Any) -> None:
    for i in range(3):
        if i == 0:
            late = 10
        late = late + 1
        put_i64(arg_ptr(args, 0), late)


def behind_a_loop(args: Any, thread: Any, n_threads: Any) -> None:
    for i in range(thread):
        last = i
    put_i64(arg_ptr(args, 0), last)


def shadowing(args: Any, thread: Any, n_threads: Any) -> None:
    if thread == 0:
        COUNT = 3
    put_i64(arg_ptr(args, 0), COUNT)


def numbers_and(args: Any, thread: Any, n_threads: Any) -> None:
    put_i64(arg_ptr(args, 0), thread or 3)


def tuples(args: Any, thread: Any, n_threads: Any) -> None:
    if (thread, n_threads) == (0, 1):
        put_i64(arg_ptr(args, 0), 1)


def too_wide(args: Any, thread: Any, n_threads: Any) -> None:
    put_i64(arg_ptr(args, 0), thread & (1 << 70))


def powers(args: Any, thread: Any, n_threads: Any) -> None:
    put_i64(arg_ptr(args, 0), thread**n_threads)


def float_floor(args: Any, thread: Any, n_threads: Any) -> None:
    put_f32(arg_ptr(args, 0), get_f32(arg_ptr(args, 0)) // 2.0)


def tries(args: Any, thread: Any, n_threads: Any) -> None:
    try:
        put_i64(arg_ptr(args, 0), thread)
    finally:
        put_i64(arg_ptr(args, 0), 0)


WRONG = {
    powers: r"line 1: kernels have no operator Pow: thread \*\* n_threads",
    float_floor: "line 1: there is no floordiv of floats",
    tries: r"line 1: kernels have no Try: try:$",
    carried: "late has no value here, or has one on some of the ways only",
    behind_a_loop: "last has no value here",
    shadowing: "COUNT has no value here",
    numbers_and: "thread is int64: compare it with 0",
    tuples: "do not compare tuples",
    too_wide: "more than 64 bits",
    undefined: "line 1: nothing has no value here",
    several: "sign takes 2 arguments, not 0",
    changing: "line 3: acc has no value here",
    downwards: r"count up, unlike range\(3, 0, -1\)",
    leaving: "no Break",
    open_count: "count must be a constant at compile time",
    mixed: "add of Vec",
}


@pytest.mark.parametrize("fn", WRONG, ids=lambda fn: fn.__name__)
def test_what_is_no_kernel_is_told_where(fn: Callable[..., None]) -> None:
    with pytest.raises(KernelError, match="kernel try does not compile") as caught:
        compile_kernel(fn, pick_target(None), "try")
    said = str(caught.value)
    line = fn.__code__.co_firstlineno
    wanted = re.sub(r"line (\d)", lambda found: f"line {line + int(found[1])}", WRONG[fn])
    assert re.search(wanted, said)
    assert f"test_translation.{fn.__name__}, line " in said
