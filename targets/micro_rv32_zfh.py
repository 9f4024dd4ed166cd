"""RV32IMAFC with Zfh: scalars of half precision, such as small cores for learning on a device."""

from __future__ import annotations

from headrace.targets.target import Target

TARGET = Target(
    name="rv32-zfh",
    triple="riscv32-unknown-linux-gnu",
    cpu="generic-rv32",
    features="+m,+a,+f,+c,+zfh",
    abi="ilp32f",
    vector_bytes=4,
    half=True,
    gemm_tiles=1,
    gemm_tokens=1,
    gemm_lanes=4,
    needs=frozenset({"m", "a", "f", "zfh"}),
    rank=6,
    machines=("qemu-riscv32 -cpu rv32,d=false,Zfh=true",),
    too_old=("qemu-riscv32 -cpu rv32,d=false",),
)
