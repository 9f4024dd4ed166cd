"""AArch64 with SVE vectors of at least 256 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headrace.targets.aarch64_options import IN_ORDER
from headrace.targets.sve_length import attributes, guard
from headrace.targets.target import Target


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets import aarch64_sve

    return aarch64_sve.sve(256)


TARGET = Target(
    name="aarch64-sve256",
    triple="aarch64-unknown-linux-gnu",
    cpu="generic",
    features="+v8.2a,+fullfp16,+sve",
    attributes=attributes(256),
    guard=guard(256),
    vector_bytes=32,
    shuffle_bytes=16,  # SVE's own shuffles cross groups
    gemm_tiles=1,
    gemm_tokens=16,
    gemm_lanes=8,
    q8_in_registers=True,
    in_order_options=IN_ORDER,
    needs=frozenset({"neon", "fullfp16", "sve", "sve256"}),
    rank=13,
    sources=(
        "headrace.targets.aarch64",
        "headrace.targets.aarch64_sve",
        "headrace.targets.pieces",
        "headrace.targets.scalable",
    ),
    machines=(
        "qemu-aarch64 -cpu max,sve-max-vq=2",
        "qemu-aarch64 -cpu max,sve-max-vq=4",
    ),
    too_old=(
        "qemu-aarch64 -cpu max,sve-max-vq=1",
        "qemu-aarch64 -cpu cortex-a76",
    ),
    load_primitives=_primitives,
)
