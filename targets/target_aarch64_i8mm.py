"""AArch64 with products of INT8 matrices (Neoverse V1 and N2, Cortex-A510, A710 and later)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.aarch64_options import IN_ORDER
from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import aarch64

    return aarch64.I8MM


TARGET = Target(
    name="aarch64-i8mm",
    triple="aarch64-unknown-linux-gnu",
    cpu="cortex-a710",
    features="-sve",
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=16,
    gemm_lanes=4,
    token_pairs=True,
    needs=frozenset({"neon", "dotprod", "fullfp16", "i8mm"}),
    rank=12,
    q8_in_registers=True,
    in_order_options=IN_ORDER,
    sources=("headrace.targets.aarch64", "headrace.targets.pieces"),
    machines=("qemu-aarch64 -cpu max,sve=off",),
    too_old=("qemu-aarch64 -cpu cortex-a76",),
    load_primitives=_primitives,
)
