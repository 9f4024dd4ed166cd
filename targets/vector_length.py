"""RISC-V vectors have a length that the CPU decides; what a build for one length needs to know."""

from __future__ import annotations

import ctypes
import mmap
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


# A function of no arguments that gives the bytes of a vector register, 0 without RVV 1.0. CPUs with
# the draft 0.7.1 call it "v" as well; they know no policy for tails, and call such a type illegal.
READ_BYTES = b"".join(
    word.to_bytes(4, "little")
    for word in (
        0x0C000593,  # li a1, 0xc0: e8, m1, ta, ma
        0x80B07557,  # vsetvl a0, zero, a1: as many bytes as a register has
        0xC21025F3,  # csrr a1, vtype: its highest bit says that it is illegal
        0x0005D463,  # bgez a1, 8
        0x00000513,  # li a0, 0
        0x00008067,  # ret
    )
)


@cache
def host_bits() -> int:
    """Bits of this CPU's vector registers, as it says itself; 0 if they are not those of RVV 1.0.

    The system must have said that there are some.

    Raises:
        OSError: the system lets no program make code.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page.write(READ_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    protection = mmap.PROT_READ | mmap.PROT_EXEC
    length = ctypes.c_size_t(mmap.PAGESIZE)
    if libc.mprotect(ctypes.c_void_p(address), length, protection):
        raise OSError(ctypes.get_errno(), "a page cannot be made executable")
    if flush := getattr(libc, "__riscv_flush_icache", None):
        flush(ctypes.c_void_p(address), ctypes.c_void_p(address + len(READ_BYTES)), 0)
    return 8 * int(ctypes.CFUNCTYPE(ctypes.c_int64)(address)())


def host_lengths() -> frozenset[str]:
    """The vector lengths that this CPU has, in LLVM's names of features."""
    return frozenset(f"zvl{bits}b" for bits in LENGTHS if bits <= host_bits())


NO_VECTORS = "qemu-riscv64 -cpu rv64,v=false"
