"""How LLVM makes code of matrix products for AArch64; apart, for targets are read without LLVM."""

from __future__ import annotations

# Products fill the registers. LLVM's scheduler loads too much ahead, its pass over addresses undoes
# the steps from entry to entry, and its own allocator shifts 16 sums to free a run of registers.
IN_ORDER = ("-enable-misched=0", "-disable-lsr", "-regalloc=pbqp")
