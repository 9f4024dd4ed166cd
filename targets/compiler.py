"""Compile a kernel for a target: Numba's front end; LLVM's part is `headrace.targets.backend`.

The only module that imports Numba (through `headrace.targets.lowering`). Kernels are plain
functions over the markers of `headrace.targets.simd`; plain functions that they call are inlined by
Numba, those that are `simd.apart` by LLVM.
"""

from __future__ import annotations

import contextlib
import re
import types as python_types
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.ir as ir
import numba
from numba.core import cgutils, codegen, compiler, cpu, inline_closurecall, registry, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.typed_passes import NopythonRewrites
from numba.core.typing.templates import AbstractTemplate, signature
from numba.core.untyped_passes import GenericRewrites

import headrace.targets.lowering_bytes
import headrace.targets.lowering_planes
import headrace.targets.lowering_products
import headrace.targets.lowering_words  # noqa: F401
from headrace.errors import KernelError
from headrace.targets import lowering, simd
from headrace.targets.backend import (
    IN_ORDER_MARK,
    emit_object,
    target_machine,
)
from headrace.targets.ir_text import constant_bytes
from headrace.targets.table import symbol_of
from headrace.targets.target import Target

_KERNEL_ARGS = (lowering.PTR, types.int64, types.int64)


class _Library(codegen.AOTCodeLibrary):
    """Leaves optimising to `headrace.targets.backend`, which has the whole kernel."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass


class _Pipeline(compiler.CompilerBase):
    """Numba's passes, less those for arrays and printing: they look at every statement in vain."""

    def define_pipelines(self) -> list[Any]:
        found = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
        whole = compiler.PassManager("kernel")
        for one, says in found.passes:
            if one not in (NopythonRewrites, GenericRewrites):
                whole.add_pass(one, says)
        whole.finalize()
        return [whole]


class _CrossCodegen(codegen.AOTCPUCodegen):
    """Numba's code generator for a CPU that need not be the host."""

    _library_class = _Library

    def __init__(self, target: Target) -> None:
        self._target = target
        super().__init__("headrace", target.cpu)

    def _create_empty_module(self, name: str) -> ir.Module:
        module = ir.Module(cgutils.normalize_ir_text(name))
        module.triple = self._target.triple
        if self._data_layout:
            module.data_layout = self._data_layout
        return module

    def _init(self, llvm_module: Any) -> None:
        del llvm_module
        self._tm_features = self._target.features
        self._tm = target_machine(self._target)
        self._target_data = self._tm.target_data
        self._data_layout = str(self._target_data)
        self._loopvect = False
        self._opt_level = 0
        self._engine = None


class _CrossContext(cpu.CPUContext):
    """Numba's target context around that code generator."""

    def __init__(self, target: Target) -> None:
        self._headrace_target = target
        super().__init__(registry.cpu_target.typing_context)

    def init(self) -> None:
        self.is32bit = False
        self._internal_codegen: Any = _CrossCodegen(self._headrace_target)
        self.refresh()

    def create_module(self, name: str) -> ir.Module:
        return self._internal_codegen._create_empty_module(name)


class _InlineWorker(inline_closurecall.InlineWorker):
    """Inlines without Numba's two copies, which take a sixth of the time it takes to compile.

    They are for callers that keep what they pass; `inline_function` makes it for the one call.
    """

    def inline_function(self, *args: Any, **kwargs: Any) -> Any:
        with _replaced(inline_closurecall, "copy", _UNCOPIED):
            return super().inline_function(*args, **kwargs)


_UNCOPIED = python_types.SimpleNamespace(deepcopy=lambda block: block)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _Parts:
    """Functions of a kernel that are compiled apart, once for each combination of argument types.

    Attributes:
        names: of those that there are, as Numba has mangled them.
    """

    def __init__(self, context: _CrossContext) -> None:
        self.names: list[str] = []
        self._context = context

    def called(self, fn: Callable[..., Any]) -> Any:
        """What stands for a function of no result in those that call it."""
        parts = self

        class Call(AbstractTemplate):
            key = fn

            def generic(self, args: Any, kws: Any) -> Any:
                if args not in known:
                    parts._compile(fn, args)
                    known.add(args)
                return signature(types.none, *args)

        known: set[Any] = set()
        return python_types.SimpleNamespace(_numba_type_=types.Function(Call))

    def _compile(self, fn: Callable[..., Any], args: Any) -> None:
        result = _compiled(fn, args, self._context)
        self._context.insert_user_function(fn, result.fndesc, [result.library])
        self.names.append(result.fndesc.mangled_name)


def _inlinable(fn: Callable[..., Any], seen: dict[Any, Any], parts: _Parts) -> Callable[..., Any]:
    """A copy of `fn` whose plain Python callees are inlined or compiled apart, recursively."""
    if fn in seen:
        return seen[fn]

    def convert(value: Any) -> Any:
        is_plain = isinstance(value, python_types.FunctionType)
        if is_plain and value.__dict__.get("apart"):
            if value not in seen:
                seen[value] = parts.called(_inlinable(value, {}, parts))
            return seen[value]
        if is_plain and simd.MARKERS.get(value.__name__) is not value:
            return numba.njit(
                _inlinable(value, seen, parts), inline="always", no_cpython_wrapper=True
            )
        return value

    names = set(fn.__code__.co_names)
    scope = {k: (convert(v) if k in names else v) for k, v in fn.__globals__.items()}
    cells = tuple(
        python_types.CellType(convert(cell.cell_contents)) for cell in fn.__closure__ or ()
    )
    copy = python_types.FunctionType(
        fn.__code__, scope, fn.__name__, fn.__defaults__, cells or None
    )
    seen[fn] = copy
    return copy


def _wrapper(symbol: str, mangled: str, guard: bytes) -> str:
    """The C entry point: void (args, thread, n_threads); a kernel cannot fail, so no status."""
    prologue = f"prologue {constant_bytes(guard)} " if guard else ""
    return f"""
define void @{symbol}(ptr %args, i64 %thread, i64 %threads) {prologue}{{
  %ret = alloca ptr
  %exc = alloca ptr
  %status = call i32 @"{mangled}"(ptr %ret, ptr %exc, ptr %args, i64 %thread, i64 %threads)
  ret void
}}
"""


def _compiled(fn: Callable[..., Any], args: Any, context: _CrossContext) -> Any:
    flags = compiler.Flags()
    flags.no_compile = True
    flags.enable_looplift = False
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.nrt = False
    flags.boundscheck = False
    typing = registry.cpu_target.typing_context
    return compiler.compile_extra(
        typing, context, fn, args, types.none, flags, {}, pipeline_class=_Pipeline
    )


def _front_end(fn: Callable[..., Any], target: Target, symbol: str) -> str:
    context = _CrossContext(target)
    parts = _Parts(context)
    with (
        global_compiler_lock,
        _replaced(inline_closurecall, "InlineWorker", _InlineWorker),
        lowering.lowering_for(
            target,
            fn.__dict__.get("lanes", lowering.LANES),
            fn.__dict__.get("token_pairs", False),
        ),
    ):
        result = _compiled(_inlinable(fn, {}, parts), _KERNEL_ARGS, context)
        result.library.finalize()
        text = str(result.library._final_module)
    # Numba numbers the functions that it compiles, and one source shall give the same bytes always.
    mangled, plain = result.fndesc.mangled_name, "kernel"
    for i, name in enumerate(parts.names):
        text = text.replace(name.removeprefix("_ZN"), f"part{i}")
    text = text.replace(mangled.removeprefix("_ZN"), plain)
    if fn.__dict__.get("in_order"):
        text += f"\n!{IN_ORDER_MARK} = !{{}}\n"
    text = re.sub(r"^target (triple|datalayout) = .*$", "", text, flags=re.M)
    # A word of Numba's that kernels do not use: not to be shared among objects, or shown.
    text = text.replace("= common ", "= internal ")
    return text + _wrapper(symbol, f"_ZN{plain}", target.guard)


def compile_kernel(fn: Callable[..., Any], target: Target, name: str) -> bytes:
    """Object code of a kernel; see `headrace.targets.backend.emit_object`.

    Raises:
        KernelError: the function is not a kernel, or LLVM refuses it.
    """
    try:
        text = _front_end(fn, target, symbol_of(name))
    except Exception as error:
        raise KernelError(f"kernel {name} does not compile for {target.name}: {error}") from error
    return emit_object(text, target, name)
