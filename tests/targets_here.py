"""The targets that this CPU runs, and which of them CI tests whole."""

from __future__ import annotations

import re
from typing import Any

import pytest

from headrace.sparse.registry import FORMATS
from headrace.targets.host import runnable_targets

TARGETS = {target.name: target for target in runnable_targets()}
# Everything runs on the best target and on plain AVX2; the others have few pieces of code of their
# own, which are tested everywhere.
WHOLE = {"x86-64-v3", *list(TARGETS)[-1:]}


BEST = list(TARGETS)[-1]  # models of the rarer families run on it only


# ---- what CI can do without: all of these rules stand here ----------------------------------

# Formats of a family whose kernels differ by constants: CI runs the others.
LIKE_OTHERS = {f"{kind}_g{group}" for kind in ("i4", "i4a") for group in (32, 128)}
LIKE_OTHERS |= {"i1_g64", "i3_g64", "e1m2_g128", "e3m0_g128"}
# What most models are: of other formats, targets that are not this CPU's best run one product.
USUAL_FORMATS = {"q4_0", "q8_0", "q4_k", "q6_k", "f32", "f16", "bf16"}
# Kernels that one function makes for several sizes or kinds: those targets run the others.
OF_A_KIND = re.compile(
    r"attention_\w+_d(80|128|256)|(signs|rebuild)_k(1|2|8|16)"
    r"|(gelu|relu|relu_alone|tanh|copy)_(q8x2|f32|tables|x16|columns)|\w+_gqs_g(16|64)"
)


def spared_format(name: str, target: str) -> bool:
    """Whether CI can do without most kernels of a format on a target of this CPU."""
    return name in LIKE_OTHERS or (name not in USUAL_FORMATS and target != BEST)


def spared_kernel(name: str, target: str) -> bool:
    """Whether CI can do without a kernel on a target that it tests whole."""
    operation, _, fmt = name.partition("_")
    if fmt in FORMATS and spared_format(fmt, target):
        # Each format that files have is multiplied once.
        return operation != "gemv" or fmt in LIKE_OTHERS or FORMATS[fmt].ggml_type is None
    return target != BEST and OF_A_KIND.fullmatch(name) is not None


def mark(target: str) -> list[pytest.MarkDecorator]:
    """`slow` for targets that CI can do without."""
    return [] if target in WHOLE else [pytest.mark.slow]


def best(target: str) -> list[pytest.MarkDecorator]:
    """`slow` for all targets but the best one."""
    return [] if target == BEST else [pytest.mark.slow]


def usual(fmt: str, target: str) -> list[pytest.MarkDecorator]:
    """`slow` for formats that CI can do without on a target."""
    return [pytest.mark.slow] if spared_format(fmt, target) else []


def target_params() -> list[Any]:
    """Every target as a parameter of a test."""
    return [pytest.param(name, id=name, marks=mark(name)) for name in TARGETS]
