"""RISC-V vectors have a length that the CPU decides; what a build for one length needs to know."""

from __future__ import annotations

import ctypes
from functools import cache

LENGTHS = (128, 256, 512, 1024)


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


def machine(bits: int, halves: bool = False) -> str:
    """An emulated CPU with vectors of so many bits."""
    # Lanes beyond a vector's end become ones, as they may on a CPU.
    options = "vext_spec=v1.0,rvv_ta_all_1s=true,rvv_ma_all_1s=true"
    # QEMU 7.2 has no switch for halves in vectors: it always runs them.
    scalars = ",Zfh=true" if halves else ""
    return f"qemu-riscv64 -cpu rv64,v=true,{options}{scalars},vlen={bits}"


# A kernel that says how long vectors are: it stores their bits at the address in slot 0.
READ_BITS = """
declare i64 @llvm.vscale.i64()

define void @{symbol}(ptr %args, i64 %thread, i64 %threads) {{
  %to = load ptr, ptr %args
  %scale = call i64 @llvm.vscale.i64()
  %bits = mul i64 %scale, 64
  store i64 %bits, ptr %to
  ret void
}}
"""


@cache
def host_bits() -> int:
    """Bits of this CPU's vector registers; it must have some."""
    from headrace.targets.backend import emit_object
    from headrace.targets.loading import LoadedKernels
    from headrace.targets.table import symbol_of
    from headrace.targets.target import all_targets

    name, target = "vector_bits", all_targets()["riscv64-v128"]
    kernels = LoadedKernels(target)
    code = emit_object(READ_BITS.format(symbol=symbol_of(name)), target, name)
    address = kernels.add({name: code})[name]
    bits = ctypes.c_int64()
    slots = (ctypes.c_void_p * 1)(ctypes.addressof(bits))
    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)
    entry(ctypes.addressof(slots), 0, 1)
    return bits.value


def host_lengths() -> frozenset[str]:
    """The vector lengths that this CPU has, in LLVM's names of features."""
    return frozenset(f"zvl{bits}b" for bits in LENGTHS if bits <= host_bits())


NO_VECTORS = "qemu-riscv64 -cpu rv64,v=false"
