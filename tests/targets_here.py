"""The targets that this CPU runs, and which of them CI tests whole."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.sparse.registry import FORMATS
from headrace.targets.host import runnable_targets

TARGETS = {target.name: target for target in runnable_targets()}
# Everything runs on the best target and on plain AVX2; the others have few pieces of code of their
# own, which are tested everywhere.
WHOLE = {"x86-64-v3", *list(TARGETS)[-1:]}


BEST = list(TARGETS)[-1]  # models of the rarer families run on it only


# Formats of a family whose kernels differ by constants: CI runs the others.
LIKE_OTHERS = {f"{kind}_g{group}" for kind in ("i4", "i4a") for group in (32, 128)}
LIKE_OTHERS |= {"i1_g64", "i3_g64", "e1m2_g128", "e3m0_g128"}


def spared_format(name: str, target: str) -> bool:
    """Whether CI can do without the kernels of a format on a target of this CPU."""
    return name in LIKE_OTHERS or (FORMATS[name].ggml_type is None and target != BEST)


def mark(target: str) -> list[pytest.MarkDecorator]:
    """`slow` for targets that CI can do without."""
    return [] if target in WHOLE else [pytest.mark.slow]


def best(target: str) -> list[pytest.MarkDecorator]:
    """`slow` for all targets but the best one."""
    return [] if target == BEST else [pytest.mark.slow]


def target_params() -> list[Any]:
    """Every target as a parameter of a test."""
    return [pytest.param(name, id=name, marks=mark(name)) for name in TARGETS]
