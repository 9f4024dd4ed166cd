"""Arm Cortex-M55: vectors of 16 bytes with half precision (MVE), one multiply-add a cycle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets.cortex_m import MVE

    return MVE


TARGET = Target(
    name="cortex-m55",
    triple="thumbv8.1m.main-none-unknown-eabihf",
    cpu="cortex-m55",
    features="",
    vector_bytes=16,
    half=True,
    gemm_tiles=1,
    gemm_tokens=4,
    gemm_lanes=4,
    needs=frozenset({"mve.fp", "fullfp16"}),
    rank=5,
    cycles=(
        ("vector", 2),
        ("divide", 7),
    ),
    machines=("qemu-system-arm -M mps3-an547",),
    sources=("headrace.targets.cortex_m",),
    load_primitives=_primitives,
    too_old=("qemu-system-arm -M mps2-an386",),
)
