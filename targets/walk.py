"""Where a kernel's code is written: what names stand for, and operations on that."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import llvmlite.ir as ir
from numba.core import types

from headrace.targets import lowering, scalars

_I64 = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
KERNEL = ir.FunctionType(ir.VoidType(), [_POINTER, _I64, _I64])


class Known(NamedTuple):
    """A value at compile time: a number, a function, None, or a tuple of bindings."""

    value: Any


class Value(NamedTuple):
    """A value of LLVM, or the several that a block of vectors is, and its type."""

    value: lowering.Parts
    type: types.Type


class Place(NamedTuple):
    """A value on the stack: the address of each of its parts."""

    places: tuple[ir.Value, ...]
    type: types.Type


Binding = Known | Value | Place


def parts_of(binding: Binding) -> list[Binding]:
    """The bindings of a tuple."""
    if not isinstance(binding, Known) or not isinstance(binding.value, tuple):
        raise TypeError("it is no tuple")
    return [one if isinstance(one, Binding) else Known(one) for one in binding.value]


def same(one: Binding, other: Binding) -> bool:
    if isinstance(one, Known) and isinstance(other, Known):
        # Not by ==, to which 0.0 is -0.0, and 1 is True.
        return one.value is other.value or (is_number(one) and repr(one) == repr(other))
    return one is other or (isinstance(one, Place) and one == other)


def is_number(binding: Binding) -> bool:
    return isinstance(binding, Known) and isinstance(binding.value, bool | int | float)


Path = tuple[ast.Call, ...]  # the calls that lead to a function
# Types of names at the heads of loops, by those in front; None: another value with the same name.
Heads = dict[tuple[Path, ast.stmt, str, types.Type], types.Type | None]


class Walk:
    """What all functions of a kernel have in common: the place where code is written."""

    def __init__(self, symbol: str, heads: Heads, signature: ir.FunctionType = KERNEL) -> None:
        self.heads = heads
        self.module = ir.Module("kernel")
        self.function = ir.Function(self.module, signature, symbol)
        # All places on the stack are made in the first block, which goes on when all is written.
        self.entry = self.function.append_basic_block("entry")
        self.first = self.function.append_basic_block("first")
        self.b = ir.IRBuilder(self.first)

    def finish(self, result: Value | None = None) -> None:
        """Return from the function."""
        if result is None:
            self.b.ret_void()
        else:
            self.b.ret(result.value)
        ir.IRBuilder(self.entry).branch(self.first)

    def block(self, name: str) -> ir.Block:
        return self.function.append_basic_block(name)

    def stack(self, ty: types.Type) -> Place:
        b = ir.IRBuilder(self.entry)
        return Place(tuple(b.alloca(one) for one in lowering.part_types(ty)), ty)

    @contextmanager
    def at(self, block: ir.Block) -> Iterator[None]:
        before = self.b.block
        self.b.position_at_end(block)
        yield
        self.b.position_at_end(before)

    def value(self, binding: Binding) -> Value:
        """What a binding stands for as a value of LLVM."""
        if isinstance(binding, Value):
            return binding
        if isinstance(binding, Place):
            return Value(lowering.join([self.b.load(one) for one in binding.places]), binding.type)
        if not is_number(binding):
            raise TypeError(f"{binding.value!r} is no value of a kernel")
        return Value(scalars.constant(binding.value), scalars.type_of(binding.value))

    def store(self, binding: Binding, place: Place) -> None:
        value, ty = self.value(binding)
        if ty != place.type:
            value = scalars.convert(self.b, value, ty, place.type)
        for part, at in zip(lowering.split(value), place.places, strict=True):
            self.b.store(part, at)

    def truth(self, binding: Binding) -> Known | ir.Value:
        if isinstance(binding, Known):
            return Known(bool(binding.value))
        value, ty = self.value(binding)
        return scalars.is_true(self.b, value, ty)

    def operate(self, op: Any, *operands: Binding) -> Binding:
        """An operator of Python on numbers, addresses or vectors."""
        known = [one.value for one in operands if isinstance(one, Known)]
        if any(isinstance(one, tuple) for one in known):
            raise TypeError(f"kernels do not compare tuples or compute with them ({op.__name__})")
        if len(known) == len(operands):
            return Known(op(*known))
        values = [self.value(one) for one in operands]
        arguments = tuple(one.type for one in values)
        found = lowering.operation(op, arguments)
        if found is not None:
            result, code = found
            given = lowering.Signature(result, arguments)
            return Value(code(self.b, given, [one.value for one in values]), result)
        result, lower = scalars.operation(op, arguments)
        return Value(lower(self.b, [one.value for one in values]), result)

    def marker(self, fn: Callable[..., Any], arguments: Sequence[Binding]) -> Binding:
        """A marker's call."""
        values = [self.value(one) for one in arguments]
        literals = tuple(
            scalars.literal_type(known.value) if isinstance(known, Known) else value.type
            for known, value in zip(arguments, values, strict=True)
        )
        typer, code = lowering.MEANINGS[fn]
        result = typer(*literals)
        if result is None:
            raise TypeError(f"{fn.__name__} of {', '.join(map(str, literals))}")
        given = lowering.Signature(result, literals)
        made = code(self.b, given, [one.value for one in values])
        return Known(None) if result == types.none else Value(made, result)
