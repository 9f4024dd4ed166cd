"""Arithmetic of plain numbers in kernels: Numba's types, rules and code for Python's operators."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numba.cpython.numbers  # noqa: F401  (registers itself)
from numba.core import base, callconv, registry, types
from numba.core.errors import TypingError

Scalar = bool | int | float
Lowered = Callable[[ir.IRBuilder, list[ir.Value]], ir.Value]

_I64 = ir.IntType(64)


class _Context(base.BaseContext):
    """Numba's code for operators on numbers, without any of its code generators."""

    def init(self) -> None:
        self.is32bit = False
        self.error_model = callconv.NumpyErrorModel(None)  # no exceptions: a quotient by 0 is 0

    def add_linking_libs(self, libs: Any) -> None:
        """These operators are instructions: there is nothing to link."""


@functools.cache
def _context() -> _Context:
    context = _Context(registry.cpu_target.typing_context, "cpu")
    context.refresh()
    registry.cpu_target.typing_context.refresh()
    return context


def type_of(value: Scalar) -> types.Type:
    """The type that a constant of Python has in a kernel."""
    if isinstance(value, bool):
        return types.boolean
    if isinstance(value, float):
        return types.float64
    if not -(2**63) <= value < 2**64:
        raise TypeError(f"{value} has more than 64 bits")
    return types.int64 if value < 2**63 else types.uint64


def literal_type(value: Scalar) -> types.Type:
    """As `type_of`; integers as types that know the value."""
    return types.literal(value) if type(value) is int else type_of(value)


def constant(value: Scalar) -> ir.Constant:
    """A constant of Python as LLVM has it."""
    kind = llvm_type(type_of(value))
    if isinstance(kind, ir.IntType) and value >= 2 ** (kind.width - 1) > 1:
        value = int(value) - 2**kind.width
    return ir.Constant(kind, value)


def llvm_type(ty: types.Type) -> ir.Type:
    """What a number of a type is in LLVM."""
    ty = types.unliteral(ty)
    if ty == types.boolean:
        return ir.IntType(1)
    if isinstance(ty, types.Integer):
        return ir.IntType(ty.bitwidth)
    return {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}[ty]


@functools.cache
def operation(op: Any, arguments: tuple[types.Type, ...]) -> tuple[types.Type, Lowered]:
    """The type of `op` on numbers of some types, and its code.

    Raises:
        TypeError: there is no such operation.
    """
    context = _context()
    try:
        signature = context.typing_context.resolve_function_type(op, arguments, {})
    except TypingError as error:
        given = ", ".join(map(str, arguments))
        raise TypeError(f"there is no {op.__name__} of {given}") from error
    if op in (operator.floordiv, operator.mod) and isinstance(signature.return_type, types.Float):
        raise TypeError(f"there is no {op.__name__} of floats: it wants a library's floor")
    code = context.get_function(op, signature)

    def lower(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
        cast = zip(values, arguments, signature.args, strict=True)
        return code(builder, [convert(builder, v, have, want) for v, have, want in cast])

    return signature.return_type, lower


def convert(builder: ir.IRBuilder, value: ir.Value, have: types.Type, want: types.Type) -> ir.Value:
    """A number as one of another type."""
    return value if have == want else _context().cast(builder, value, have, want)


def is_true(builder: ir.IRBuilder, value: ir.Value, ty: types.Type) -> ir.Value:
    """Whether a number is not zero."""
    return convert(builder, value, ty, types.boolean)


def common_type(one: types.Type, other: types.Type) -> types.Type | None:
    """The type of a variable that is now one, now the other; None: there is none."""
    if one == other:
        return one
    found = _context().typing_context.unify_types(one, other)
    return None if found is None or not isinstance(found, types.Number | types.Boolean) else found
