"""Compile a kernel for a target: `headrace.targets.translation`, then `headrace.targets.backend`.

Importing it imports Numba and LLVM. Kernels are plain functions over numbers and the markers of
`headrace.targets.simd`; plain functions that they call are inlined.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import headrace.targets.lowering_bytes
import headrace.targets.lowering_int32
import headrace.targets.lowering_matrix
import headrace.targets.lowering_planes
import headrace.targets.lowering_products
import headrace.targets.lowering_sums
import headrace.targets.lowering_words  # noqa: F401
from headrace.errors import KernelError
from headrace.targets import lowering
from headrace.targets.backend import IN_ORDER_MARK, emit_object
from headrace.targets.ir_text import constant_bytes
from headrace.targets.soft_float_calls import renamed
from headrace.targets.target import Target
from headrace.targets.translation import translate


def _front_end(fn: Callable[..., Any], target: Target, name: str) -> str:
    kind = fn.__dict__
    with lowering.lowering_for(
        target, kind.get("lanes", lowering.LANES), kind.get("token_pairs", False)
    ):
        text = str(translate(fn, name))
    text = re.sub(r"^target (triple|datalayout) = .*$", "", text, flags=re.M)
    guard = f" prologue {constant_bytes(target.guard)}" if target.guard else ""
    text = re.sub(r"^(define .*)\n\{$", lambda found: f"{found[1]}{guard} {{", text, flags=re.M)
    if kind.get("in_order"):
        text += f"\n!{IN_ORDER_MARK} = !{{}}\n"
    return text


def compile_kernel(fn: Callable[..., Any], target: Target, name: str) -> bytes:
    """Object code of a kernel; see `headrace.targets.backend.emit_object`.

    Raises:
        KernelError: the function is not a kernel, or LLVM refuses it.
    """
    try:
        text = _front_end(fn, target, name)
    except Exception as error:
        raise KernelError(f"kernel {name} does not compile for {target.name}: {error}") from error
    code = emit_object(text, target, name)
    return code if target.floats else renamed(code)
