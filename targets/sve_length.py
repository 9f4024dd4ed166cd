"""SVE vectors have a length that the CPU decides; what a build for one length needs to know."""

from __future__ import annotations

import ctypes

LENGTHS = (128, 256, 512, 1024, 2048)
_PR_SVE_GET_VL = 51  # of the kernel's uapi/linux/prctl.h; the low 16 bits are the length in bytes


def guard(bits: int) -> bytes:
    """Machine code that stops where vector registers have less than so many bits.

    Code for long vectors would give wrong results on short ones, without a trap of its own.
    """
    words = (
        0x04BF5029,  # rdvl x9, #1: bytes of a register; illegal where there is no SVE
        0xF100013F | bits // 8 << 10,  # cmp x9, bytes
        0x54000042,  # b.hs 8
        0x00000000,  # udf
    )
    return b"".join(word.to_bytes(4, "little") for word in words)


def attributes(bits: int) -> str:
    """What tells LLVM that vectors have so many bits or more: fixed-length ones then use SVE."""
    return f"vscale_range({bits // 128},16)"


def up_to(bits: int) -> frozenset[str]:
    """Names of the lengths that vectors of so many bits have: "sve256" for 256 bits or more."""
    return frozenset(f"sve{one}" for one in LENGTHS if one <= bits)


def host_lengths() -> frozenset[str]:
    """Names of the vector lengths that this thread has, as the system says; none without SVE."""
    said: int = ctypes.CDLL(None).prctl(_PR_SVE_GET_VL)
    return up_to((said & 0xFFFF) * 8 if said >= 0 else 0)
