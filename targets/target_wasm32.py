"""WebAssembly with 128-bit vectors, as every current browser and engine has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import wasm

    return wasm.SIMD128


TARGET = Target(
    name="wasm32",
    triple="wasm32-unknown-unknown",
    cpu="generic",
    features="+simd128,+bulk-memory,+sign-ext,+nontrapping-fptoint",
    vector_bytes=16,
    gemm_tiles=1,
    gemm_tokens=4,
    few_tokens=2,
    needs=frozenset({"simd128"}),
    rank=30,
    sources=(
        "headrace.targets.wasm",
        "headrace.targets.fallbacks",
        "headrace.targets.pieces",
        "headrace.targets.portable",
    ),
    machines=("wasmtime",),
    load_primitives=_primitives,
)
