"""Kernels of microcontrollers on emulated boards, bit for bit what numpy says they compute."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from headrace.errors import KernelError
from headrace.micro.kernels import matmul
from headrace.micro.kernels.numbers import numbers_of
from headrace.micro.kernels.table import kernel_table
from headrace.targets.bare_metal import board_of
from headrace.targets.cache import KernelStore
from headrace.targets.compare import WrongResultError, check
from headrace.targets.emulation.count import count_instructions
from headrace.targets.emulation.machines import why_not
from headrace.targets.emulation.run import IllegalInstructionError, run
from headrace.targets.table import Case
from headrace.targets.target import Target, microcontrollers

TARGETS, KERNELS = microcontrollers(), kernel_table()


def needed(machine: str) -> None:
    """Skip where a machine cannot run."""
    if reason := why_not(machine):
        pytest.skip(reason)


@cache
def code_of(target_name: str, kernel: str) -> bytes:
    return KernelStore(TARGETS[target_name]).objects([KERNELS[kernel]])[kernel]


# Their float32 is what others compute, by the same instructions, or by those that
# `test_soft_float.py` proves: in CI one of each kind is enough.
LIKE_OTHERS = ("cortex-m3", "cortex-m7", "cortex-m33", "rv32-zfh")


def every_case() -> Iterator[Any]:
    for target in TARGETS.values():
        for machine in target.machines:
            for kernel in KERNELS:
                again = target.name in LIKE_OTHERS and kernel.endswith("_single")
                marks = [pytest.mark.slow] if again else []
                yield pytest.param(target.name, machine, kernel, marks=marks)


@pytest.mark.parametrize(("target_name", "machine", "kernel"), list(every_case()))
def test_every_case_bit_for_bit(target_name: str, machine: str, kernel: str) -> None:
    needed(machine)
    target = TARGETS[target_name]
    cases = list(KERNELS[kernel].cases(target, np.random.default_rng(1)))
    launches = [(case.slots, 1) for case in cases]
    run(kernel, code_of(target_name, kernel), target, machine, launches)
    for case in cases:
        assert case.exact
        check(case)


def test_a_nan_that_got_lost_is_found() -> None:
    nan, other, one = (np.array([v], np.uint16).view(np.float16) for v in (0x7E00, 0xFE01, 0x3C00))
    check(Case([nan], [(nan, other)], 0, "another NaN"))
    for found, expected in ((one, nan), (nan, one)):
        with pytest.raises(WrongResultError, match="not equal bit for bit"):
            check(Case([found], [(found, expected)], 0, "lost"))


@pytest.mark.parametrize(
    ("target_name", "machine"),
    [(t.name, machine) for t in TARGETS.values() for machine in t.too_old],
)
def test_a_chip_without_the_instructions_fails_loudly(target_name: str, machine: str) -> None:
    needed(machine)
    target = TARGETS[target_name]
    case = next(iter(KERNELS[matmul.NAME].cases(target, np.random.default_rng(1))))
    with pytest.raises(IllegalInstructionError, match="illegal instruction"):
        run(
            matmul.NAME, code_of(target_name, matmul.NAME), target, machine,
            [(case.slots, 1)],
        )  # fmt: skip


def product(target: Target, n: int, k: int, m: int) -> list[Any]:
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((n, k), (k, m)))
    c, start = np.zeros((n, m), np.float16), np.zeros(m, np.float16)
    expected = matmul.reference(numbers_of(target, "half"), a, b, start)
    return [matmul.slots(a, b, c, start), c, expected]


def test_counting_changes_nothing() -> None:
    """The same count by the plugin and by the log, of a program that gives the same result."""
    target = TARGETS["cortex-m55"]
    (machine,) = target.machines
    needed(machine)
    counts = []
    for compiled_plugin in (True, False):
        slots, found, expected = product(target, 6, 9, 16)
        counts.append(
            count_instructions(
                matmul.NAME, code_of(target.name, matmul.NAME), target, machine,
                [(slots, 1)], compiled_plugin=compiled_plugin,
            ).instructions
        )  # fmt: skip
        assert found.tobytes() == expected.tobytes()
    assert counts[0] == counts[1] > 6 * 9 * 16 // 8


def test_an_image_that_is_larger_than_the_memory() -> None:
    target = TARGETS["cortex-m4f"]
    (machine,) = target.machines
    needed(machine)
    slots, *_ = product(target, 1, 1, 8)
    slots.append(np.zeros(17 << 20, np.uint8))
    with pytest.raises(KernelError, match="exit status 3"):
        run(matmul.NAME, code_of(target.name, matmul.NAME), target, machine, [(slots, 1)])


def test_boards() -> None:
    assert board_of("qemu-aarch64 -cpu cortex-a53") is None
    assert board_of("qemu-system-arm -M mps3-an547") is not None
    for machine in ("qemu-system-arm", "qemu-system-arm -M raspi0"):
        with pytest.raises(KernelError, match="only mps3-an547, "):
            board_of(machine)
