"""What decides a kernel's code, as a hash: its sources, the target's and the code generator's."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path

from headrace.targets.table import Kernel
from headrace.targets.target import Target

_GENERATOR = (
    "headrace.targets.simd",
    "headrace.targets.lowering",
    "headrace.targets.lowering_bytes",
    "headrace.targets.lowering_int32",
    "headrace.targets.lowering_matrix",
    "headrace.targets.lowering_planes",
    "headrace.targets.lowering_products",
    "headrace.targets.lowering_sums",
    "headrace.targets.lowering_words",
    "headrace.targets.compiler",
    "headrace.targets.constants",
    "headrace.targets.scalars",
    "headrace.targets.soft_float_calls",
    "headrace.targets.syntax",
    "headrace.targets.translation",
    "headrace.targets.walk",
    "headrace.targets.backend",
    "headrace.targets.ir_text",
)
# The versions of the compiler, as text: importing Numba to ask it would cost 0.2 s.
COMPILER = ("numba/_version.py", "llvmlite/_version.py")


@cache
def _source(module: str) -> bytes:
    package, _, file = module.partition("/")
    if file:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(package)
        return (Path(spec.origin).parent / file).read_bytes()
    loaded = sys.modules.get(module)
    origin = getattr(loaded, "__file__", None)
    if origin is None:
        spec = importlib.util.find_spec(module)
        origin = spec.origin if spec else None
    if origin is None:
        raise ModuleNotFoundError(module)
    return Path(origin).read_bytes()


@cache
def _digest(modules: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        digest.update(_source(module))
        digest.update(b"\0")
    return digest.hexdigest()


def kernel_key(kernel: Kernel, target: Target, *more: str) -> str:
    """Hash of the text of all that decides a kernel's code for a target, and of `more` modules."""
    what = (
        kernel.name,
        target.code_key,
        _digest((*_GENERATOR, *more, *target.sources, target.load_primitives.__module__)),
        _digest(kernel.sources),
    )
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:32]
