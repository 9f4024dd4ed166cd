"""AArch64 with dotprod and half precision (Cortex-A75, A76 and later, Apple A12 and later)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.aarch64_options import IN_ORDER
from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import aarch64

    return aarch64.DOTPROD


TARGET = Target(
    name="aarch64-dotprod",
    triple="aarch64-unknown-linux-gnu",
    cpu="cortex-a76",
    features="",
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=16,
    gemm_lanes=4,
    needs=frozenset({"neon", "dotprod", "fullfp16"}),
    rank=11,
    q8_in_registers=True,
    in_order_options=IN_ORDER,
    sources=("headrace.targets.aarch64", "headrace.targets.pieces"),
    machines=("qemu-aarch64 -cpu cortex-a76",),
    too_old=("qemu-aarch64 -cpu cortex-a53",),
    load_primitives=_primitives,
)
