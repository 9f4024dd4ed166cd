"""Looking up bytes in registers, and float8: every byte, on every target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from foreign import FOREIGN, MOST, param
from targets_here import WHOLE

from headrace.sparse.lookup import E2M1, E2M1_HIGH, E2M1_LOW, IQ4, IQ4_HIGH, IQ4_LOW
from headrace.targets.compiler import compile_kernel
from headrace.targets.emulation.machines import NATIVE
from headrace.targets.emulation.run import run
from headrace.targets.host import runnable_targets
from headrace.targets.simd import (
    SMALL,
    arg_ptr,
    load_e4m3,
    load_u8,
    lookup16,
    store_f32,
    store_u8,
    with_lanes,
)
from headrace.targets.target import all_targets

NATIVE_TARGETS = {target.name: target for target in runnable_targets()}
CI = {*WHOLE, *MOST}
EVERY_BYTE = np.arange(256, dtype=np.uint8)


def kernel(lanes: int) -> Any:
    """Slots: 0 256 bytes, 1 to 4 what they choose (low and high bits, two tables), 5 float32."""
    step = 4 * lanes

    def look(args: Any, thread: Any, n_threads: Any) -> None:
        src = arg_ptr(args, 0)
        for i in range(256 // step):
            v = load_u8(src + i * step, 1, 0)
            at = i * step
            store_u8(arg_ptr(args, 1) + at, lookup16(v, 0, IQ4_LOW, IQ4_HIGH, 8))
            store_u8(arg_ptr(args, 2) + at, lookup16(v, 4, IQ4_LOW, IQ4_HIGH, 8))
            store_u8(arg_ptr(args, 3) + at, lookup16(v, 0, E2M1_LOW, E2M1_HIGH, SMALL))
            store_u8(arg_ptr(args, 4) + at, lookup16(v, 4, E2M1_LOW, E2M1_HIGH, SMALL))
        for i in range(256 // lanes):
            store_f32(arg_ptr(args, 5) + i * step, load_e4m3(src + i * lanes, 1, 0), 0)

    return with_lanes(look, lanes)


def rows() -> list[Any]:
    return [
        param(target, machine, lanes, slow=target.name not in CI)
        for target in (*NATIVE_TARGETS.values(), *FOREIGN.values())
        for machine in (target.machines[:1] if target.name in FOREIGN else [NATIVE])
        for lanes in (4, 8, 16)
        if 4 * lanes >= target.vector_bytes
    ]


@pytest.mark.parametrize(("target_name", "machine", "lanes"), rows())
def test_every_byte(target_name: str, machine: str, lanes: int) -> None:
    target = all_targets()[target_name]
    found = [np.zeros(256, np.int8) for _ in range(4)]
    floats = np.zeros(256, np.float32)
    name = f"look_{lanes}"
    code = compile_kernel(kernel(lanes), target, name)
    run(name, code, target, machine, [([EVERY_BYTE.copy(), *found, floats], 1)])
    bias = target.dot_bias(SMALL)
    expected = [
        values[EVERY_BYTE >> shift & 15] + np.int8(more)
        for values, more in ((IQ4, 0), (E2M1, bias))
        for shift in (0, 4)
    ]
    for got, wanted in zip(found, expected, strict=True):
        assert np.array_equal(got, wanted)
    exponent, mantissa = EVERY_BYTE >> 3 & 15, EVERY_BYTE & 7
    normal = (8.0 + mantissa) * 2.0 ** (exponent - 18.0)
    value = np.where(exponent == 0, mantissa * 2.0**-17, normal)
    assert np.array_equal(floats, np.where(EVERY_BYTE == 0x7F, 0, value).astype(np.float32))
