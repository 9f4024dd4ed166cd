"""RISC-V vectors have a length that the CPU decides; what a build for one length needs to know."""

from __future__ import annotations


def guard(bits: int) -> bytes:
    """Machine code that stops where vector registers have less than so many bits.

    Code for long vectors would give wrong results on short ones, without a trap of its own.
    """
    words = (
        0xC22022F3,  # csrr t0, vlenb: bytes of a register; illegal where there are no vectors
        bits // 8 << 20 | 0x00000313,  # li t1, bytes
        0x0062F463,  # bgeu t0, t1, 8
        0xC0001073,  # unimp
    )
    return b"".join(word.to_bytes(4, "little") for word in words)


def machine(bits: int) -> str:
    """An emulated CPU with vectors of so many bits."""
    # Lanes beyond a vector's end become ones, as they may on a CPU.
    poison = "rvv_ta_all_1s=true,rvv_ma_all_1s=true"
    return f"qemu-riscv64 -cpu rv64,v=true,vext_spec=v1.0,{poison},vlen={bits}"


NO_VECTORS = "qemu-riscv64 -cpu rv64,v=false"
