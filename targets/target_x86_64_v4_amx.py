"""x86-64-v4 with AMX for bytes (Sapphire Rapids and later)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from headrace.targets import target_x86_64_v4_bf16
from headrace.targets.target import Target

_BF16 = target_x86_64_v4_bf16.TARGET


def _primitives() -> Mapping[str, Callable[..., Any]]:
    from headrace.targets.x86_amx import AMX

    return {**_BF16.load_primitives(), **AMX}


TARGET: Target = replace(
    _BF16,
    name="x86-64-v4-amx",
    features=f"{_BF16.features},+amx-tile,+amx-int8",
    needs=_BF16.needs | {"amx-int8"},
    rank=_BF16.rank + 1,
    byte_matrix=True,
    sources=(*_BF16.sources, "headrace.targets.x86_amx"),
    load_primitives=_primitives,
)
