"""float32 arithmetic by integers, on an emulated chip without a floating-point unit."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from headrace.targets.compiler import compile_kernel
from headrace.targets.emulation.machines import why_not
from headrace.targets.emulation.run import run
from headrace.targets.fp16 import SINGLE, Arithmetic
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    bcast_f32,
    f32,
    fma_outer,
    get_f16,
    get_f32,
    get_i32,
    load_f32,
    put_f16,
    put_f32,
    put_i32,
    put_u8,
    store_f32,
    with_lanes,
)
from headrace.targets.soft_float import ROUTINES
from headrace.targets.soft_float_calls import routines_in
from headrace.targets.target import microcontrollers

CHIP, HARD = (microcontrollers()[name] for name in ("cortex-m3", "cortex-m4f"))


def _operations(args: Any, thread: Any, n_threads: Any) -> None:
    """All that a kernel does with numbers, but multiply-adds."""
    a, b, c, n = arg_ptr(args, 0), arg_ptr(args, 1), arg_ptr(args, 2), arg_int(args, 3)
    for i in range(n):
        x, y, z = get_f32(a + 4 * i), get_f32(b + 4 * i), get_f32(c + 4 * i)
        to, bits = arg_ptr(args, 4) + 32 * i, arg_ptr(args, 5) + 8 * i
        put_f32(to, x + y)
        put_f32(to + 4, x - y)
        put_f32(to + 8, x * y)
        put_f32(to + 12, x / y)
        put_f32(to + 16, f32(get_i32(a + 4 * i)))
        put_f32(to + 20, get_f16(a + 4 * i))
        put_i32(to + 24, 0)
        put_f16(to + 24, x)
        put_u8(bits, 1 if x == y else 0)
        put_u8(bits + 1, 1 if x < y else 0)
        put_u8(bits + 2, 1 if x <= y else 0)
        put_u8(bits + 3, 1 if x > y else 0)
        put_u8(bits + 4, 1 if x >= y else 0)
        put_u8(bits + 5, 1 if x != y else 0)
        put_u8(bits + 6, 1 if x != x or y != y else 0)
        put_f32(to + 28, z)


def _fused(args: Any, thread: Any, n_threads: Any) -> None:
    """Multiply-adds of 4 numbers at a time."""
    for i in range(arg_int(args, 3)):
        p, q, r = (arg_ptr(args, 0) + 4 * i), (arg_ptr(args, 1) + 16 * i), arg_ptr(args, 2) + 16 * i
        found = fma_outer(load_f32(q, 1, 0), bcast_f32(p, 1, 0), load_f32(r, 1, 0))
        store_f32(arg_ptr(args, 4) + 16 * i, found, 0)


NAME = "test"
OPERATIONS, FUSED = with_lanes(_operations, 4), with_lanes(_fused, 4)
EXTREME = [
    0x00000000, 0x00000001, 0x00000002, 0x003FFFFF, 0x00400000, 0x007FFFFF, 0x00800000, 0x00800001,
    0x00FFFFFF, 0x01000000, 0x33000000, 0x33000001, 0x337FFFFF, 0x33800000, 0x387FC000, 0x387FE000,
    0x387FFFFF, 0x38800000, 0x38801000, 0x38803000, 0x3EFFFFFF, 0x3F000000, 0x3F7FFFFF, 0x3F800000,
    0x3F800001, 0x3F801000, 0x3FFFFFFF, 0x40000000, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x4B7FFFFF,
    0x4B800000, 0x4B800001, 0x4EFFFFFF, 0x4F000000, 0x7E800000, 0x7EFFFFFF, 0x7F000000, 0x7F7FFFFF,
    0x7F800000, 0x7F800001, 0x7FA12345, 0x7FC00000, 0x7FC12345, 0x7FFFFFFF,
]  # fmt: skip


def needed(machine: str) -> None:
    if reason := why_not(machine):
        pytest.skip(reason)


def floats(rng: np.random.Generator, n: int) -> np.ndarray:
    """float32 of every kind: extreme ones, any bits, and significands that are short or long."""
    extreme = np.array([*EXTREME, *(x | 1 << 31 for x in EXTREME)], np.uint32)
    near = rng.integers(0x3E000000, 0x41000000, n, np.uint32) & rng.choice(
        np.array([0xFFFFFFFF, 0xFFFFF000, 0xFFFF0000, 0xFF800000], np.uint32), n
    )
    kinds = [
        rng.choice(extreme, n), rng.integers(0, 1 << 32, n, np.uint32),
        near | rng.integers(0, 2, n, np.uint32) << 31, rng.integers(0, 1 << 25, n, np.uint32),
    ]  # fmt: skip
    return np.choose(rng.integers(0, len(kinds), n), kinds).astype(np.uint32).view(np.float32)


def every_pair(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Each extreme number with each, and n more."""
    extreme = np.array([*EXTREME, *(x | 1 << 31 for x in EXTREME)], np.uint32).view(np.float32)
    pairs = [one.ravel() for one in np.meshgrid(extreme, extreme)]
    return tuple(np.concatenate([one, floats(rng, n)]) for one in pairs)  # type: ignore[return-value]


@cache
def code_of(fn: Any, target: Any) -> bytes:
    return compile_kernel(fn, target, NAME)


def ran(fn: Any, target: Any, arrays: list[Any]) -> None:
    run(NAME, code_of(fn, target), target, target.machines[0], [(arrays, 1)])


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bit for bit, NaN as NaN."""
    both = np.isnan(found) & np.isnan(expected)
    words = np.dtype(f"u{found.itemsize}")
    return bool((both | (found.view(words) == expected.view(words))).all())


def operations_of(target: Any, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    needed(target.machines[0])
    found, bits = np.zeros((len(a), 8), np.float32), np.zeros((len(a), 8), np.uint8)
    ran(OPERATIONS, target, [a, b, b.copy(), len(a), found, bits])
    return found, bits


def test_operations_beside_numpy() -> None:
    a, b = every_pair(np.random.default_rng(1), 40_000)
    found, bits = operations_of(CHIP, a, b)
    with np.errstate(all="ignore"):
        expected = [a + b, a - b, a * b, a / b, a.view(np.int32).astype(np.float32)]
        halves = a.astype(np.float16)
    for i, one in enumerate(expected):
        assert same(found[:, i].copy(), one), i
    assert same(found[:, 5].copy(), a.view(np.float16)[::2].astype(np.float32))
    assert same(found[:, 6].copy().view(np.float16)[::2].copy(), halves)
    tests = [a == b, a < b, a <= b, a > b, a >= b, a != b, np.isnan(a) | np.isnan(b)]
    assert (bits[:, :7] == np.stack(tests, 1)).all()


def triples(n: int) -> list[np.ndarray]:
    """Operands of multiply-adds; of a third the product is nearly the addend's opposite."""
    rng = np.random.default_rng(2)
    a, b, c = np.repeat(floats(rng, n // 4), 4), floats(rng, n), floats(rng, n)
    with np.errstate(all="ignore"):
        near = (-(a * b)).view(np.int32) + rng.integers(-3, 4, n, np.int32)
    return [a, b, np.where(rng.integers(0, 3, n) == 0, near.view(np.float32), c)]


def fused_of(target: Any, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    needed(target.machines[0])
    found = np.zeros(len(a), np.float32)
    ran(FUSED, target, [np.ascontiguousarray(a[::4]), b, c, len(a) // 4, found])
    return found


def test_multiply_adds_are_rounded_once() -> None:
    a, b, c = triples(80_000)
    of = Arithmetic(SINGLE)
    expected = of.stored(of.fma(a, b, c))
    assert same(fused_of(CHIP, a, b, c), expected)
    with np.errstate(all="ignore"):
        assert not same(expected, a * b + c)


def test_bits_of_what_is_no_number() -> None:
    """Also of NaNs: as a floating-point unit of the same kind gives them."""
    a, b = every_pair(np.random.default_rng(3), 4_000)
    for soft, hard in zip(operations_of(CHIP, a, b), operations_of(HARD, a, b), strict=True):
        assert soft.tobytes() == hard.tobytes()
    three = triples(20_000)
    assert fused_of(CHIP, *three).tobytes() == fused_of(HARD, *three).tobytes()


def test_all_routines_are_called() -> None:
    codes = [code_of(fn, CHIP) for fn in (OPERATIONS, FUSED)]
    assert routines_in(codes) == [row.name for row in ROUTINES.values()]
    assert not routines_in([code_of(OPERATIONS, HARD)])
