"""RV32IMAFC with Zve32f and Zvfh: vectors of 16 bytes or more in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets.riscv_fixed_point import FIXED_POINT

    return FIXED_POINT


TARGET = Target(
    name="rv32-zvfh",
    triple="riscv32-unknown-linux-gnu",
    cpu="generic-rv32",
    features="+m,+a,+f,+c,+zfh,+zve32f,+zvfh,+zvl128b",
    abi="ilp32f",
    vector_bytes=16,
    half=True,
    gemm_tiles=1,
    gemm_tokens=1,
    gemm_lanes=4,
    needs=frozenset({"m", "a", "f", "zfh", "zve32f", "zvfh"}),
    rank=7,
    machines=("qemu-riscv32 -cpu rv32,Zfh=true,v=true,vext_spec=v1.0,vlen=128",),
    sources=("headrace.targets.riscv_fixed_point", "headrace.targets.scalable"),
    load_primitives=_primitives,
    too_old=("qemu-riscv32 -cpu rv32,Zfh=true",),
)
