"""RISC-V primitives, in LLVM's IR builder; the target files pick from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.fallbacks import f32_to_half_by_bits, half_to_f32_by_bits
from headrace.targets.lowering import intrinsic_call, nibbles, vector_bytes
from headrace.targets.pieces import concat, cut
from headrace.targets.portable import dot4, every, widened
from headrace.targets.scalable import Scalable, to_fixed, to_scalable
from headrace.targets.simd import SMALL

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_CODES = Scalable(_I8, 8)  # a register

Pair = tuple[ir.Value, ir.Value]


def _clock(b: ir.IRBuilder) -> ir.Value:
    return intrinsic_call(b, "llvm.readsteadycounter", _I64, [])


HALVES: Mapping[str, Callable[..., Any]] = {
    "half_to_f32": half_to_f32_by_bits,
    "f32_to_half": f32_to_half_by_bits,
}
COMMON: Mapping[str, Callable[..., Any]] = {"clock": _clock}


def _copy_runs(b: ir.IRBuilder, dst: ir.Value, src: ir.Value, stride: ir.Value, run: int) -> None:
    """Run by run: LLVM would load all of the 256 bytes before it stores one."""
    ty = ir.IntType(8 * run)
    for row in range(16):
        begin = b.gep(src, [b.mul(stride, ir.Constant(_I64, row))])
        for k in range(16 // run):
            at = b.gep(begin, [ir.Constant(_I64, k * run)])
            to = b.gep(dst, [ir.Constant(_I64, (16 * k + row) * run)])
            value = b.load(b.bitcast(at, ty.as_pointer()), align=1)
            b.store(value, b.bitcast(to, ty.as_pointer()), align=run)


SCALAR: Mapping[str, Callable[..., Any]] = {
    **COMMON,
    **HALVES,
    "dot4": dot4,
    "copy_runs": _copy_runs,
}


# --- vectors: byte products summed in 16 bits where 8 of them fit ---------------------------------


def _narrow(lanes: int) -> ir.Type:
    return ir.VectorType(_I16, 4 * lanes)


def _pairs(b: ir.IRBuilder, value: ir.Value, width: int) -> ir.Value:
    """Sums of neighbours, in `width` bits (`vnsrl` twice, then an addition)."""
    low, high = every(b, value, 0, 2), every(b, value, 1, 2)
    if width > value.type.element.width:
        low, high = (widened(b, one, width) for one in (low, high))
    return b.add(low, high)


def _dot4(
    b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
) -> Pair:
    products = b.mul(widened(b, w, 16, bits), widened(b, x, 16))
    if bits < 8:
        # 8 x 31 x 127 and 4 x 63 x 127 fit in 16 bits: one sum for each byte.
        return wide, b.add(narrow, products)
    # So do two products of |w| <= 128 and |x| <= 127: their sums are summed in 32 bits.
    sums = b.bitcast(narrow, ir.VectorType(_I32, narrow.type.count // 2))
    pairs = widened(b, _pairs(b, products, 16), 32)
    return wide, b.bitcast(b.add(sums, pairs), narrow.type)


def _dot_result(b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, bits: int) -> ir.Value:
    if bits == 8:
        sums = b.bitcast(narrow, ir.VectorType(_I32, narrow.type.count // 2))
    else:
        sums = _pairs(b, narrow, 16 if bits in (4, SMALL) else 32)  # 2 x 8 x 15 x 127 still fits
    return b.add(wide, _pairs(b, sums, 32))


def _half_to_f32(b: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Exact widening of halves: what can be done on 16-bit elements costs half as much there."""
    ty = half.type
    if not isinstance(ty, ir.VectorType):
        return half_to_f32_by_bits(b, half)

    def constant(like: ir.Type, value: int) -> ir.Constant:
        return ir.Constant(like, [value] * like.count)

    special = b.icmp_unsigned(">", b.and_(half, constant(ty, 0x7FFF)), constant(ty, 0x7BFF))
    # Copies of the sign lie between it and the exponent.
    spread = b.shl(widened(b, half, 32), constant(ir.VectorType(_I32, ty.count), 13))
    moved = b.and_(spread, constant(spread.type, 0x8FFFE000))
    floats = ir.VectorType(ir.FloatType(), ty.count)
    scaled = b.fmul(b.bitcast(moved, floats), ir.Constant(floats, [2.0**112] * ty.count))
    infinite = b.bitcast(b.or_(moved, constant(moved.type, 0x7F800000)), floats)
    return b.select(special, infinite, scaled)


def _lookup16(b: ir.IRBuilder, table: ir.Constant, v: ir.Value, shift: int) -> ir.Value:
    """`vrgather.vv`, a register at a time: of longer groups every register sees every other."""
    n = min(v.type.count, vector_bytes())
    low = to_scalable(b, table, _CODES)
    name = f"llvm.riscv.vrgather.vv.{_CODES.name}.i64"
    found = []
    for row in cut(b, nibbles(b, v, shift), n):
        undef = ir.Constant(_CODES, ir.Undefined)
        operands = [undef, low, to_scalable(b, row, _CODES), ir.Constant(_I64, n)]
        one = intrinsic_call(b, name, _CODES, operands)
        found.append(to_fixed(b, one, ir.VectorType(_I8, n)))
    return concat(b, found)


DOT: Mapping[str, Callable[..., Any]] = {
    "dot_narrow": _narrow,
    "dot4": _dot4,
    "dot_result": _dot_result,
    "lookup16": _lookup16,
}
VECTOR_HALVES: Mapping[str, Callable[..., Any]] = {**COMMON, **DOT}
VECTOR: Mapping[str, Callable[..., Any]] = {**VECTOR_HALVES, **HALVES, "half_to_f32": _half_to_f32}
