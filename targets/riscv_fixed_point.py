"""RISC-V vectors' own fixed-point arithmetic, and products of bytes that add up in 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.lowering import intrinsic_call
from headrace.targets.lowering_int32 import BY_LANES
from headrace.targets.scalable import Scalable, to_fixed, to_scalable

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_TO_NEAREST = ir.Constant(_I32, 0)  # of two to the greater one
_UNCHANGED_TAIL = ir.Constant(_I32, 3)  # or whatever: there is none


def _scalable(value: ir.Value) -> Scalable:
    """Of as many elements, with registers of 128 bits."""
    return Scalable(value.type.element, value.type.count // 2)


def _by_intrinsic(name: str, b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """On chips of 32 bits."""
    ty = _scalable(x)
    operands = [
        ir.Constant(ty, ir.Undefined), to_scalable(b, x, ty), to_scalable(b, y, ty), _TO_NEAREST,
        ir.Constant(_I32, x.type.count),
    ]  # fmt: skip
    full = f"llvm.riscv.{name}.{ty.name}.{ty.name}.i32"
    return to_fixed(b, intrinsic_call(b, full, ty, operands), x.type)


def _doubling_high(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    if x.type.count == 1:
        return BY_LANES["doubling_high"](b, x, y)
    return _by_intrinsic("vsmul", b, x, y)


def _nearest_shift(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    if x.type.count == 1:
        return BY_LANES["nearest_shift"](b, x, by)
    return _by_intrinsic("vssra", b, x, b.neg(by))


def _rounding_shift(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    """`vssra` rounds to the greater of two: one less where a negative number is shifted."""
    if x.type.count == 1:
        return BY_LANES["rounding_shift"](b, x, by)
    less = b.ashr(b.and_(x, by), ir.Constant(x.type, [31] * x.type.count))
    return _nearest_shift(b, b.add(x, less), by)


def _add_products(b: ir.IRBuilder, acc: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """`vwmacc` takes 16 bits to 32."""
    short = b.sext(codes, ir.VectorType(_I16, codes.type.count))
    wide, narrow = _scalable(acc), Scalable(_I16, acc.type.count // 2)
    operands = [
        to_scalable(b, acc, wide), b.trunc(x, _I16), to_scalable(b, short, narrow),
        ir.Constant(_I32, acc.type.count), _UNCHANGED_TAIL,
    ]  # fmt: skip
    name = f"llvm.riscv.vwmacc.{wide.name}.i16.{narrow.name}.i32"
    return to_fixed(b, intrinsic_call(b, name, wide, operands), acc.type)


FIXED_POINT: Mapping[str, Callable[..., Any]] = {
    "doubling_high": _doubling_high,
    "rounding_shift": _rounding_shift,
    "nearest_shift": _nearest_shift,
    "add_products": _add_products,
}
