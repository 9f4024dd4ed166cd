"""AArch64 with the instructions that every core has: no byte products into 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.aarch64_options import IN_ORDER
from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import aarch64

    return aarch64.NEON


TARGET = Target(
    name="aarch64-neon",
    triple="aarch64-unknown-linux-gnu",
    cpu="cortex-a53",
    features="",
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=16,
    gemm_lanes=4,
    needs=frozenset({"neon"}),
    rank=10,
    q8_in_registers=True,
    in_order_options=IN_ORDER,
    sources=("headrace.targets.aarch64", "headrace.targets.pieces"),
    machines=("qemu-aarch64 -cpu cortex-a53",),
    load_primitives=_primitives,
)
