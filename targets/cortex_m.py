"""Cortex-M primitives, in LLVM's IR builder; the target files pick from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.lowering import intrinsic_call, splat

_I8, _I16, _I32 = (ir.IntType(n) for n in (8, 16, 32))
_FOUR = ir.VectorType(_I32, 4)


# --- DSP extension: two 16-bit integers in a register ---------------------------------------------


def _even_bytes(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return intrinsic_call(b, "llvm.arm.sxtb16", _I32, [value])


def _odd_bytes(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    eight = ir.Constant(_I32, 8)
    return _even_bytes(b, intrinsic_call(b, "llvm.fshr.i32", _I32, [value, value, eight]))


def _dot_pairs(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    return intrinsic_call(b, "llvm.arm.smlad", _I32, [x, y, acc])


# --- MVE ------------------------------------------------------------------------------------------


def _doubling_high(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return intrinsic_call(b, "llvm.arm.mve.vqrdmulh.v4i32", _FOUR, [x, y])


def _nearest_shift(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    flags = [ir.Constant(_I32, flag) for flag in (0, 1, 0)]  # saturating, rounding, unsigned
    name = "llvm.arm.mve.vshl.vector.v4i32.v4i32"
    return intrinsic_call(b, name, _FOUR, [x, by, *flags])


def _rounding_shift(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    """`vrshl` rounds to the greater of two: one less where a negative number is shifted."""
    top = ir.Constant(_FOUR, [31] * 4)
    less = b.ashr(b.and_(x, by), top)
    return _nearest_shift(b, b.add(x, less), by)


def _hidden(b: ir.IRBuilder, y: ir.Value) -> ir.Value:
    """Of floats that others are compared with, LLVM must not see that all lanes are one number.

    It writes `y > x` as `x < y` then (LLVM 22), which is wrong of NaN: MVE has EQ, GE and GT false
    of it, but NE, LT and LE true, as their opposites (Arm DDI 0553, VCMP).
    """
    kind = "f16" if isinstance(y.type.element, ir.HalfType) else "f32"
    return intrinsic_call(b, f"llvm.arithmetic.fence.v{y.type.count}{kind}", y.type, [y])


def _is_nan(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """One comparison: LLVM makes two of "not comparable with itself", and keeps them in memory."""
    return b.fcmp_unordered("!=", x, _hidden(b, x))


def _of_four(
    own: Callable[..., ir.Value], name: str
) -> Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]:
    """Vectors of other lengths are left to LLVM."""
    from headrace.targets import lowering_int32

    def code(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        return (own if x.type == _FOUR else lowering_int32.BY_LANES[name])(b, x, y)

    return code


DSP: Mapping[str, Callable[..., Any]] = {
    "even_bytes": _even_bytes,
    "odd_bytes": _odd_bytes,
    "dot_pairs": _dot_pairs,
}


def _gather_bytes(b: ir.IRBuilder, p: ir.Value, offsets: ir.Value) -> ir.Value:
    flags = [ir.Constant(_I32, flag) for flag in (8, 0, 1)]  # bits, shift of offsets, unsigned
    name = "llvm.arm.mve.vldr.gather.offset.v16i8.p0.v16i8"
    return intrinsic_call(b, name, offsets.type, [p, offsets, *flags])


def _scatter_i8(b: ir.IRBuilder, p: ir.Value, value: ir.Value, offsets: ir.Value) -> None:
    flags = [ir.Constant(_I32, flag) for flag in (8, 0)]  # bits, shift of offsets
    name = "llvm.arm.mve.vstr.scatter.offset.p0.v4i32.v4i32"
    intrinsic_call(b, name, ir.VoidType(), [p, offsets, value, *flags])


def _dot_sum(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """LLVM would find it, but not where it widens bytes in front of a loop."""
    flags = [ir.Constant(_I32, 0)] * 3  # unsigned, subtracting, exchanging
    return intrinsic_call(b, "llvm.arm.mve.vmldava.v16i8", _I32, [*flags, acc, x, y])


def _narrowed(b: ir.IRBuilder, codes: ir.Value, wide: ir.Value, top: int) -> ir.Value:
    """The lower or upper halves of lanes as the nearest integers to those of `wide`."""
    kinds = [f"v{ty.count}i{ty.element.width}" for ty in (codes.type, wide.type)]
    flags = [ir.Constant(_I32, flag) for flag in (0, 0, top)]  # unsigned result, and operand
    name = f"llvm.arm.mve.vqmovn.{'.'.join(kinds)}"
    return intrinsic_call(b, name, codes.type, [codes, wide, *flags])


def _store_in_turn(
    b: ir.IRBuilder, p: ir.Value, first: ir.Value, second: ir.Value, more: ir.Value
) -> None:
    halves = ir.Constant(ir.VectorType(_I16, 8), ir.Undefined)
    codes = _narrowed(b, _narrowed(b, halves, first, 0), second, 1)
    one = b.trunc(b.extract_element(more, ir.Constant(_I32, 0)), _I16)
    codes = intrinsic_call(b, "llvm.sadd.sat.v8i16", codes.type, [codes, splat(b, one, 8)])
    bytes_ = _narrowed(b, b.bitcast(codes, ir.VectorType(_I8, 16)), codes, 0)
    found = b.trunc(b.bitcast(bytes_, codes.type), ir.VectorType(_I8, 8))
    b.store(found, b.bitcast(p, found.type.as_pointer())).align = 1


MVE: Mapping[str, Callable[..., Any]] = {
    "hidden": _hidden,
    "is_nan": _is_nan,
    "dot_sum": _dot_sum,
    "scatter_i8": _scatter_i8,
    "gather_bytes": _gather_bytes,
    "doubling_high": _of_four(_doubling_high, "doubling_high"),
    "rounding_shift": _of_four(_rounding_shift, "rounding_shift"),
    "nearest_shift": _of_four(_nearest_shift, "nearest_shift"),
    "store_in_turn": _store_in_turn,
}
