"""RISC-V 64 with vectors (RVV 1.0) of at least 256 bits, and conversions of halves in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target
from headrace.targets.vector_length import LENGTHS, guard, machine


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import riscv

    return riscv.VECTOR_HALVES


TARGET = Target(
    name="riscv64-v256-zvfh",
    triple="riscv64-unknown-linux-gnu",
    cpu="generic-rv64",
    features="+m,+a,+f,+d,+c,+v,+zvl256b,+zfhmin,+zvfhmin",
    abi="lp64d",
    # Other orders form more products at once than there are registers for.
    llvm_options=("-enable-misched=false",),
    guard=guard(256),
    vector_bytes=32,
    gemm_tiles=1,
    gemm_tokens=4,
    gemm_lanes=8,
    needs=frozenset({"m", "a", "f", "d", "c", "v", "zvl256b", "zfhmin", "zvfhmin"}),
    rank=24,
    sources=(
        "headrace.targets.riscv",
        "headrace.targets.fallbacks",
        "headrace.targets.pieces",
        "headrace.targets.portable",
        "headrace.targets.scalable",
    ),
    machines=tuple(machine(bits, halves=True) for bits in LENGTHS[1:]),
    too_old=(machine(128, halves=True),),
    load_primitives=_primitives,
)
