"""Products of integers give the same bits on every target: numpy's int64 sums, exactly.

Weights are random codes with scales of 1, activations are integers. Then every partial sum is an
integer that float32 holds exactly, and no order of operations or fused instruction may change it:
what is compared is the int32 accumulators and all that is added to and taken off them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from foreign import FOREIGN, MOST, param

from headrace.sparse.format import Format
from headrace.sparse.linear import (
    group_tokens,
    kernels,
    pack_f32,
    quantize_q8,
    quantize_q8x2,
    together,
)
from headrace.sparse.registry import FORMATS
from headrace.sparse.token_pairs import pair_entries
from headrace.sparse.unpacking import unpacking_slots
from headrace.targets.cache import KernelStore
from headrace.targets.emulation.machines import NATIVE
from headrace.targets.emulation.run import run
from headrace.targets.host import runnable_targets
from headrace.targets.target import Target, all_targets

ROWS, BLOCKS = 21, 2
# Where a block's float16 scales lie, and the bytes of its finer scales with a mask that keeps
# products small enough: float32 holds integers up to 2**24.
SCALES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq4_nl": (0,), "iq4_xs": (0,), "mxfp4": (), "nvfp4": (), "tq1_0": (52,), "tq2_0": (64,),
    "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,), "iq1_s": (0,),
    "iq1_m": (),
    "e2m1_g16": (0, 2), "e2m1_g128": (0,), "e1m2_g128": (0,), "e3m0_g128": (0,),
    "i1_g64": (0,), "i2_g64": (0,), "i3_g64": (0,), "i4_dual": (0,),
    "i4_g16": (0, 2), "i4_g32": (0,), "i4_g64": (0,), "i4_g128": (0,),
    "i4a_g16": (0, 2), "i4a_g32": (0,), "i4a_g64": (0,), "i4a_g128": (0,),
    "nvint4": (), "s24_g32": (0,), "s16of32_g32": (0,), "s8of32_g32": (0,),
}  # fmt: skip
FINE = {
    "q2_k": (slice(0, 16), 0x33), "q4_k": (slice(4, 16), 0x03), "q5_k": (slice(4, 16), 0x01),
    "q6_k": (slice(192, 208), 0x07),
    "iq2_xxs": (slice(9, 66, 8), 0x0F), "iq2_xs": (slice(66, 74), 0), "iq2_s": (slice(74, 82), 0),
    "iq3_xxs": (slice(69, 98, 4), 0x0F), "iq3_s": (slice(106, 110), 0x11),
    "iq1_s": (slice(35, 50, 2), 0x8F), "i4_dual": (slice(2, 6), 0x11),
    "i4a_g16": (slice(4, 6), 0x38), "i4a_g32": (slice(2, 3), 0x38),
    "i4a_g64": (slice(2, 3), 0x38), "i4a_g128": (slice(2, 3), 0x38),
}  # fmt: skip
# Scales of other types: where they begin and end, and the byte which makes the weights integers.
WHOLE = {
    "mxfp4": ((0, 1, 128),),
    "nvfp4": ((0, 4, 0x40),),
    "iq4_xs": ((2, 4, 0xAA), (4, 8, 0x11)),
    # Scales of 8 and 4.
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq1_s"), ((1, 2, 0x48),)),
    "iq3_xxs": ((1, 2, 0x44),),
    "nvint4": ((0, 4, 0x78),),
    # Which weights are kept.
    "s16of32_g32": ((2, 6, 0x55),),
    "s8of32_g32": ((2, 6, 0x11),),
    "iq1_m": ((48, 53, 0), (53, 54, 0x80), (54, 55, 0), (55, 56, 0x40)),
}
ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)
NATIVE_TARGETS = {target.name: target for target in runnable_targets()}
QUICK = {*list(NATIVE_TARGETS)[-1:], *MOST}


def integer_weights(fmt: Format, rng: np.random.Generator) -> np.ndarray:
    """Raw rows that stand for integers."""
    if fmt.name not in SCALES:  # a float of its own for each weight
        return fmt.encode(rng.integers(-9, 10, (ROWS, 32 * BLOCKS)).astype(np.float32))
    raw = rng.integers(0, 256, (ROWS, BLOCKS, fmt.block_bytes), dtype=np.uint8)
    for at in SCALES[fmt.name]:
        raw[..., at : at + 2] = ONE
    for begin, end, byte in WHOLE.get(fmt.name, ()):
        raw[..., begin:end] = byte
    if fmt.name in FINE:
        where, mask = FINE[fmt.name]
        raw[..., where] &= mask
    return raw.reshape(ROWS, -1)


def integer_activations(
    operation: str, fmt: Format, n: int, tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Integers [tokens, n], and how a kernel takes them. Each block has 127, so its scale is 1."""
    x = rng.integers(-127, 128, (tokens, n))
    x[:, ::32] = rng.choice((-127, 127), (tokens, n // 32))
    if fmt.activation == "f32":
        return x, pack_f32(x.astype(np.float32), tokens)
    pack = quantize_q8x2 if operation.endswith("2") else quantize_q8
    return x, pack(x.astype(np.float32), tokens)


def products(target: Target, operation: str, fmt: Format) -> tuple[list[Any], np.ndarray]:
    """A product's slots, and what comes out."""
    rng = np.random.default_rng(7)
    tokens = group_tokens(operation, fmt, target)
    raw = integer_weights(fmt, rng)
    weights = fmt.decode(raw).astype(np.int64)
    assert (weights == fmt.decode(raw)).all()
    x, packed = integer_activations(operation, fmt, weights.shape[1], tokens, rng)
    if tokens > 1 and target.token_pairs and together(fmt) == "q8":
        packed = pair_entries(packed)
    exact = x @ weights.T
    # Codes may be summed with their whole offset, which is taken off at the end of a block.
    whole = np.abs(weights) + np.abs(weights).max()
    assert (np.abs(x) @ whole.T).max() < 1 << 24
    y = np.zeros((tokens, 32), np.float32)
    expected = np.zeros_like(y)
    expected[:, :ROWS] = exact
    slots = [
        fmt.tile(raw), packed, y, weights.shape[1] // fmt.block, 2, np.array([tokens]), 0,
        y.strides[0], np.zeros(32, np.float32), packed[0].nbytes,
        *unpacking_slots(fmt, weights.shape[1], target.gemm_tiles),
    ]  # fmt: skip
    return slots, expected


def rows() -> list[Any]:
    return [
        param(
            target,
            machine,
            operation,
            name,
            slow=target.name not in QUICK or name != "q4_0" or operation.endswith("2"),
        )
        for target in (*NATIVE_TARGETS.values(), *FOREIGN.values())
        for machine in (target.machines[:1] if target.name in FOREIGN else [NATIVE])
        for name, fmt in FORMATS.items()
        for operation in kernels(fmt)
        if operation.startswith("gem") and (operation != "gemv" or fmt.activation != "tables")
    ]


@pytest.mark.parametrize(("target_name", "machine", "operation", "format_name"), rows())
def test_integers_are_exact(
    target_name: str, machine: str, operation: str, format_name: str
) -> None:
    target, fmt = all_targets()[target_name], FORMATS[format_name]
    kernel = kernels(fmt)[operation]
    slots, expected = products(target, operation, fmt)
    code = KernelStore(target).objects([kernel])[kernel.name]
    run(kernel.name, code, target, machine, [(slots, 1)])
    found: np.ndarray = slots[2]
    assert (found[:, :ROWS] == expected[:, :ROWS]).all()
    assert np.isfinite(found).all()
