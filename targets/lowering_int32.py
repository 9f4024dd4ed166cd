"""What integers of 32 bits mean, and fixed-point arithmetic: see `headrace.targets.lowering`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba.core import types

from headrace.targets.lowering import (
    INT32,
    Int32Type,
    VecType,
    as_i64,
    intrinsic_call,
    is_integer,
    join,
    marker,
    on_operator,
    primitive,
    split,
)

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _as_i32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return value if value.type.width == 32 else b.trunc(as_i64(b, value), _I32)


@marker("int32", lambda value: INT32 if is_integer(value) else None)
def _int32(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _as_i32(b, args[0])


def _with_one(result: types.Type) -> Callable[..., types.Type | None]:
    """Operators of two integers, one of which has 32 bits."""

    def typer(x: types.Type, y: types.Type) -> types.Type | None:
        has_one = isinstance(x, Int32Type) or isinstance(y, Int32Type)
        return result if has_one and is_integer(x) and is_integer(y) else None

    return typer


_Code = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
_BINARY: dict[Any, _Code] = {
    operator.add: lambda b, x, y: b.add(x, y),
    operator.sub: lambda b, x, y: b.sub(x, y),
    operator.mul: lambda b, x, y: b.mul(x, y),
    operator.and_: lambda b, x, y: b.and_(x, y),
    operator.or_: lambda b, x, y: b.or_(x, y),
    operator.xor: lambda b, x, y: b.xor(x, y),
    operator.lshift: lambda b, x, y: b.shl(x, y),
    operator.rshift: lambda b, x, y: b.ashr(x, y),
}
_COMPARE = {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.eq: "==", operator.ne: "!=",
}  # fmt: skip


def _operator(op: Any, result: types.Type, code: _Code) -> None:
    @on_operator(op, _with_one(result))
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return code(b, *(_as_i32(b, one) for one in args))


def _compared(text: str) -> _Code:
    return lambda b, x, y: b.icmp_signed(text, x, y)


for _op, _code in _BINARY.items():
    _operator(_op, INT32, _code)
for _op, _text in _COMPARE.items():
    _operator(_op, types.boolean, _compared(_text))


@on_operator(operator.neg, lambda x: x if isinstance(x, Int32Type) else None)
def _neg(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.neg(args[0])


@marker("widened", lambda value: types.int64 if isinstance(value, Int32Type) else None)
def _widened(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.zext(args[0], _I64)


@marker("leading_zeros", lambda value: INT32 if is_integer(value) else None)
def _leading_zeros(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    ty = args[0].type
    zero_too = ir.Constant(ir.IntType(1), 0)
    return _as_i32(b, intrinsic_call(b, f"llvm.ctlz.i{ty.width}", ty, [args[0], zero_too]))


# --- vectors of them ------------------------------------------------------------------------------


def _every(value: ir.Value, number: int, bits: int = 32) -> ir.Constant:
    n = value.type.count
    return ir.Constant(ir.VectorType(ir.IntType(bits), n), [number] * n)


def _doubling_high(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    wide = ir.VectorType(_I64, x.type.count)
    product = b.add(b.mul(b.sext(x, wide), b.sext(y, wide)), _every(x, 2**30, 64))
    return b.trunc(b.ashr(product, _every(x, 31, 64)), x.type)


def _rounding_shift(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    one, top = _every(x, 1), _every(x, 31)
    # -1 where a negative number is shifted at all.
    less = b.ashr(b.and_(x, by), top)
    down = b.neg(by)
    half = b.lshr(b.shl(one, down), one)
    return b.ashr(b.add(b.add(x, half), less), down)


def _add_rounded_high(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """Of single numbers `smmlar` of Arm's DSP extension, which LLVM finds in no other order."""
    n = x.type.count
    if n == 1:
        acc, x, y = (b.extract_element(one, ir.Constant(_I32, 0)) for one in (acc, x, y))
    wide = _I64 if n == 1 else ir.VectorType(_I64, n)

    def number(value: int) -> ir.Constant:
        return ir.Constant(wide, value if n == 1 else [value] * n)

    start = b.or_(b.shl(b.zext(acc, wide), number(32)), number(2**31))
    total = b.add(b.mul(b.sext(x, wide), b.sext(y, wide)), start)
    high = b.trunc(b.lshr(total, number(32)), acc.type)
    if n > 1:
        return high
    one = ir.Constant(ir.VectorType(_I32, 1), ir.Undefined)
    return b.insert_element(one, high, ir.Constant(_I32, 0))


def _nearest_shift(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    one, down = _every(x, 1), b.neg(by)
    return b.ashr(b.add(x, b.lshr(b.shl(one, down), one)), down)


def _select(sign: str) -> _Code:
    return lambda b, x, y: b.select(b.icmp_signed(sign, x, y), x, y)


def _same(x: types.Type, y: types.Type) -> types.Type | None:
    """Vectors of int32, of which the second may be for all of the first."""
    if not isinstance(x, VecType) or not isinstance(y, VecType):
        return None
    fits = x.element == y.element == "i32" and y.count in (1, x.count)
    return x if fits else None


def _same_three(acc: types.Type, x: types.Type, y: types.Type) -> types.Type | None:
    return x if acc == x == y else None


@marker("add_rounded_high", _same_three)
def _add_rounded_highs(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    rows = zip(*(split(one) for one in args), strict=True)
    return join([_add_rounded_high(b, *row) for row in rows])


def _by_lanes(name: str, code: _Code) -> None:
    @marker(name, _same)
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        own = primitive(name) or code
        x, y = (split(one) for one in args)
        return join([own(b, *row) for row in zip(x, y * (len(x) // len(y)), strict=True)])


BY_LANES: dict[str, _Code] = {
    "doubling_high": _doubling_high,
    "rounding_shift": _rounding_shift,
    "nearest_shift": _nearest_shift,
    "least_i32": _select("<"),
    "most_i32": _select(">"),
}
for _name, _code in BY_LANES.items():
    _by_lanes(_name, _code)
