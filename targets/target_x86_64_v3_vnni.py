"""x86-64-v3 with AVX-VNNI: 256-bit vectors with the 4-way byte dot product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import x86

    return x86.vnni(256)


TARGET = Target(
    name="x86-64-v3-vnni",
    triple="x86_64-unknown-linux-gnu",
    cpu="x86-64-v3",
    # LLVM would split `vpdpwssd` in two, which takes more instructions than are free.
    features="+avxvnni,+fast-dpwssd",
    vector_bytes=32,
    gemm_tiles=1,
    gemm_tokens=4,
    few_tokens=2,
    needs=frozenset({"avx2", "fma", "f16c", "bmi2", "avxvnni"}),
    rank=4,
    signed_dot_bias=128,
    small_dot_bias=16,
    decode_pairs=True,
    ahead=8192,
    sources=("headrace.targets.x86", "headrace.targets.fallbacks"),
    load_primitives=_primitives,
)
