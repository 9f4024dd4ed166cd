"""Primitives in plain LLVM vectors, for CPUs whose instructions LLVM combines well by itself."""

from __future__ import annotations

import llvmlite.ir as ir

from headrace.targets.simd import SMALL

_I32 = ir.IntType(32)

Pair = tuple[ir.Value, ir.Value]


def every(b: ir.IRBuilder, value: ir.Value, first: int, step: int) -> ir.Value:
    """Elements first, first + step, ... of a vector."""
    index = list(range(first, value.type.count, step))
    undef = ir.Constant(value.type, ir.Undefined)
    return b.shuffle_vector(value, undef, ir.Constant(ir.VectorType(_I32, len(index)), index))


def widened(b: ir.IRBuilder, value: ir.Value, width: int, bits: int = 8) -> ir.Value:
    """Bytes as integers of `width` bits; they are signed if codes of `bits` bits are."""
    ty = ir.VectorType(ir.IntType(width), value.type.count)
    return b.sext(value, ty) if bits in (8, SMALL) else b.zext(value, ty)


def dot4(
    b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
) -> Pair:
    """`simd.dot4` in 32-bit products."""
    products = b.mul(widened(b, w, 32, bits), widened(b, x, 32))
    for i in range(4):
        wide = b.add(wide, every(b, products, i, 4))
    return wide, narrow
