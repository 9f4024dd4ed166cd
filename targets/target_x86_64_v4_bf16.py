"""x86-64-v4 with AVX-512 VNNI and BF16 (Zen 4 and later, Sapphire Rapids and later)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import x86

    return {**x86.vnni(512), **x86.BF16}


TARGET = Target(
    name="x86-64-v4-bf16",
    triple="x86_64-unknown-linux-gnu",
    cpu="x86-64-v4",
    # LLVM would split `vpdpwssd` in two, which takes more instructions than are free.
    features="+avx512vnni,+avx512bf16,+fast-dpwssd,-prefer-256-bit",
    vector_bytes=64,
    gemm_tiles=2,
    gemm_tokens=4,
    needs=frozenset(
        {
            "avx2",
            "fma",
            "f16c",
            "bmi2",
            "avx512f",
            "avx512bw",
            "avx512vl",
            "avx512dq",
            "avx512vnni",
            "avx512bf16",
        }
    ),
    rank=6,
    signed_dot_bias=128,
    small_dot_bias=16,
    decode_pairs=True,
    bf16_dot=True,
    ahead=8192,
    sources=("headrace.targets.x86", "headrace.targets.fallbacks"),
    load_primitives=_primitives,
)
