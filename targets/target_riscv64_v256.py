"""RISC-V 64 with vectors (RVV 1.0) of at least 256 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target
from headrace.targets.vector_length import LENGTHS, guard, machine


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import riscv

    return riscv.VECTOR


TARGET = Target(
    name="riscv64-v256",
    triple="riscv64-unknown-linux-gnu",
    cpu="generic-rv64",
    features="+m,+a,+f,+d,+c,+v,+zvl256b",
    abi="lp64d",
    # Other orders form more products at once than there are registers for.
    llvm_options=("-enable-misched=false",),
    guard=guard(256),
    vector_bytes=32,
    gemm_tiles=1,
    gemm_tokens=4,
    gemm_lanes=8,
    needs=frozenset({"m", "a", "f", "d", "c", "v", "zvl256b"}),
    rank=23,
    sources=(
        "headrace.targets.riscv",
        "headrace.targets.fallbacks",
        "headrace.targets.pieces",
        "headrace.targets.portable",
        "headrace.targets.scalable",
    ),
    machines=tuple(machine(bits) for bits in LENGTHS[1:]),
    too_old=(machine(128),),
    load_primitives=_primitives,
)
