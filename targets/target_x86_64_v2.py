"""x86-64-v2: SSE4.2 with SSSE3 byte products; no AVX, FMA or half conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import x86

    return {**x86.multiply_add(128), **x86.BEFORE_V3}


TARGET = Target(
    name="x86-64-v2",
    triple="x86_64-unknown-linux-gnu",
    cpu="x86-64-v2",
    features="",
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=4,
    few_tokens=2,
    decode_pairs=True,
    small_dot_bias=16,
    needs=frozenset({"sse4.2", "ssse3", "popcnt"}),
    rank=2,
    ahead=8192,
    sources=("headrace.targets.x86", "headrace.targets.fallbacks"),
    load_primitives=_primitives,
)
