"""RISC-V 64 as every Linux distribution assumes it: no vectors, no half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target
from headrace.targets.vector_length import NO_VECTORS


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import riscv

    return riscv.SCALAR


TARGET = Target(
    name="riscv64",
    triple="riscv64-unknown-linux-gnu",
    cpu="generic-rv64",
    features="+m,+a,+f,+d,+c",
    abi="lp64d",
    # Other orders need more registers than there are.
    llvm_options=("-misched=ilpmin",),
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=4,
    few_tokens=2,
    gemm_lanes=4,
    gemv_lanes=4,
    needs=frozenset({"m", "a", "f", "d", "c"}),
    rank=20,
    sources=(
        "headrace.targets.riscv",
        "headrace.targets.fallbacks",
        "headrace.targets.pieces",
        "headrace.targets.portable",
        "headrace.targets.scalable",
    ),
    machines=(NO_VECTORS,),
    load_primitives=_primitives,
)
