"""RISC-V 64 with vectors (RVV 1.0) of at least 128 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target
from headrace.targets.vector_length import LENGTHS, NO_VECTORS, guard, machine


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import riscv

    return riscv.VECTOR


TARGET = Target(
    name="riscv64-v128",
    triple="riscv64-unknown-linux-gnu",
    cpu="generic-rv64",
    features="+m,+a,+f,+d,+c,+v,+zvl128b",
    abi="lp64d",
    # Other orders form more products at once than there are registers for.
    llvm_options=("-misched=ilpmin",),
    guard=guard(128),
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=4,
    gemm_lanes=8,
    needs=frozenset({"m", "a", "f", "d", "c", "v", "zvl128b"}),
    rank=21,
    sources=(
        "headrace.targets.riscv",
        "headrace.targets.fallbacks",
        "headrace.targets.pieces",
        "headrace.targets.portable",
        "headrace.targets.scalable",
    ),
    machines=tuple(machine(bits) for bits in LENGTHS),
    too_old=(NO_VECTORS,),
    load_primitives=_primitives,
)
