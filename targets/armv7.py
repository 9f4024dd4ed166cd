"""ARMv7-A primitives, in LLVM's IR builder; the target file picks from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.lowering import intrinsic_call, nibbles
from headrace.targets.pieces import concat, cut

_I8, _I16, _I32 = (ir.IntType(n) for n in (8, 16, 32))
_Q16, _Q32 = ir.VectorType(_I16, 8), ir.VectorType(_I32, 4)
_D8, _D16, _D32 = ir.VectorType(_I8, 8), ir.VectorType(_I16, 4), ir.VectorType(_I32, 2)
_QF = ir.VectorType(ir.FloatType(), 4)

Pair = tuple[ir.Value, ir.Value]


def _pause(b: ir.IRBuilder) -> None:
    intrinsic_call(b, "llvm.arm.hint", ir.VoidType(), [ir.Constant(_I32, 1)])


def _products(b: ir.IRBuilder, w: ir.Value, x: ir.Value) -> list[ir.Value]:
    return [
        intrinsic_call(b, "llvm.arm.neon.vmulls.v8i16", _Q16, list(row))
        for row in zip(cut(b, w, 8), cut(b, x, 8), strict=True)
    ]


def _sums_of_four(b: ir.IRBuilder, w: ir.Value, x: ir.Value) -> ir.Value:
    """Sums of 4 products each of 16 bytes, as int32."""
    halves = []
    for product in _products(b, w, x):
        # |w * x| <= 128 * 127: the sum of two products fits in 16 bits.
        low, high = cut(b, product, 8)
        halves.append(intrinsic_call(b, "llvm.arm.neon.vpadd.v4i16", _D16, [low, high]))
    return intrinsic_call(b, "llvm.arm.neon.vpaddls.v4i32.v8i16", _Q32, [concat(b, halves)])


def _narrow(lanes: int) -> ir.Type:
    return ir.VectorType(_I16, 4 * lanes)


def _dot4(
    b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
) -> Pair:
    if bits < 8:
        # 8 x 31 x 127 and 4 x 63 x 127 fit in 16 bits: one sum for each byte (`vmlal`).
        sums = [b.add(*row) for row in zip(cut(b, narrow, 16), _products(b, w, x), strict=True)]
        return wide, concat(b, sums)
    fours = [_sums_of_four(b, *row) for row in zip(cut(b, w, 16), cut(b, x, 16), strict=True)]
    return b.add(wide, concat(b, fours)), narrow


def _dot_result(b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, bits: int) -> ir.Value:
    if bits == 8:
        return wide
    fours = []
    for eight in cut(b, narrow, 16):
        pairs = intrinsic_call(b, "llvm.arm.neon.vpaddls.v4i32.v8i16", _Q32, [eight])
        fours.append(intrinsic_call(b, "llvm.arm.neon.vpadd.v2i32", _D32, cut(b, pairs, 8)))
    return b.add(wide, concat(b, fours))


def _lookup16(b: ir.IRBuilder, table: ir.Constant, v: ir.Value, shift: int) -> ir.Value:
    name, halves = "llvm.arm.neon.vtbl2", cut(b, table, 8)
    rows = cut(b, nibbles(b, v, shift), 8)
    return concat(b, [intrinsic_call(b, name, _D8, [*halves, one]) for one in rows])


def _half_to_f32(b: ir.IRBuilder, half: ir.Value) -> ir.Value:
    if not isinstance(half.type, ir.VectorType):
        return b.fpext(b.bitcast(half, ir.HalfType()), ir.FloatType())
    name = "llvm.arm.neon.vcvthf2fp"
    return concat(b, [intrinsic_call(b, name, _QF, [four]) for four in cut(b, half, 8)])


def _f32_to_half(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if not isinstance(value.type, ir.VectorType):
        return b.bitcast(b.fptrunc(value, ir.HalfType()), _I16)
    name = "llvm.arm.neon.vcvtfp2hf"
    return concat(b, [intrinsic_call(b, name, _D16, [four]) for four in cut(b, value, 16)])


NEON: Mapping[str, Callable[..., Any]] = {
    # LLVM converts halves one by one.
    "half_to_f32": _half_to_f32,
    "f32_to_half": _f32_to_half,
    "spin_pause": _pause,
    "dot_narrow": _narrow,
    "dot4": _dot4,
    "dot_result": _dot_result,
    "lookup16": _lookup16,
}
