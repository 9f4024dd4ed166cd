"""Arm Cortex-M3: halves are stored, and computed with as float32, by integers; no vectors."""

from __future__ import annotations

from headrace.targets.target import Target

TARGET = Target(
    name="cortex-m3",
    triple="thumbv7m-none-unknown-eabi",
    cpu="cortex-m3",
    features="",
    vector_bytes=4,
    floats=False,
    gemm_tiles=1,
    gemm_tokens=1,
    gemm_lanes=4,
    needs=frozenset(),
    rank=1,
    cycles=(("load", 2), ("branch", 2), ("divide", 7)),
    machines=("qemu-system-arm -M mps2-an385",),
)
