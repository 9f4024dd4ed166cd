"""Arm Cortex-M33 with its floating-point unit: halves are stored, and computed with as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets.cortex_m import DSP

    return DSP


TARGET = Target(
    name="cortex-m33",
    triple="thumbv8m.main-none-unknown-eabihf",
    cpu="cortex-m33",
    features="",
    vector_bytes=4,
    byte_pairs=True,
    gemm_tiles=1,
    gemm_tokens=1,
    gemm_lanes=4,
    needs=frozenset({"dsp", "vfp4d16sp"}),
    rank=4,
    cycles=(
        ("load", 2),
        ("branch", 2),
        ("fused", 3),
        ("divide", 7),
    ),
    machines=("qemu-system-arm -M mps2-an505",),
    sources=("headrace.targets.cortex_m",),
    load_primitives=_primitives,
    too_old=("qemu-system-arm -M mps2-an385",),
)
