"""ARMv7-A with NEON, FMA and half conversions (Cortex-A7, A15 and later): 32-bit Linux."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import armv7

    return armv7.NEON


TARGET = Target(
    name="armv7-neon",
    triple="armv7a-unknown-linux-gnueabihf",
    cpu="cortex-a7",
    features="",
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=4,
    few_tokens=2,
    gemm_lanes=4,
    needs=frozenset({"neon", "vfp4"}),
    rank=8,
    sources=("headrace.targets.armv7", "headrace.targets.pieces"),
    machines=("qemu-arm -cpu cortex-a7", "qemu-arm -cpu cortex-a15"),
    load_primitives=_primitives,
)
