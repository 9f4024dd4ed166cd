"""x86-64-v3: AVX2, FMA, F16C; no VNNI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import x86

    return x86.multiply_add(256)


TARGET = Target(
    name="x86-64-v3",
    triple="x86_64-unknown-linux-gnu",
    cpu="x86-64-v3",
    features="",
    vector_bytes=32,
    gemm_tiles=1,
    gemm_tokens=8,
    few_tokens=2,
    gemm_lanes=8,
    float_tokens=6,
    float_lanes=16,
    in_order_options=(),  # 16 registers do not hold a strip's weights: LLVM's order spills less
    small_dot_bias=16,
    needs=frozenset({"avx2", "fma", "f16c", "bmi2"}),
    rank=3,
    ahead=8192,
    sources=("headrace.targets.x86", "headrace.targets.fallbacks"),
    load_primitives=_primitives,
)
