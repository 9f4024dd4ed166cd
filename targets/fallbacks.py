"""What CPUs without half precision and fused multiply-adds do instead."""

from __future__ import annotations

import llvmlite.ir as ir

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F32 = ir.FloatType()


def _like(ty: ir.Type, value: int) -> ir.Constant:
    if isinstance(ty, ir.VectorType):
        return ir.Constant(ty, [value] * ty.count)
    return ir.Constant(ty, value)


def _shape(ty: ir.Type, element: ir.Type) -> ir.Type:
    return ir.VectorType(element, ty.count) if isinstance(ty, ir.VectorType) else element


def half_to_f32_by_bits(b: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Exact widening of halves with integer operations and one exact multiplication by 2**112."""
    wide = b.zext(half, _shape(half.type, _I32))
    ty = wide.type
    magnitude = b.shl(b.and_(wide, _like(ty, 0x7FFF)), _like(ty, 13))
    scale = b.bitcast(_like(ty, 0x77800000), _shape(ty, _F32))  # 2**112
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, scale.type), scale), ty)
    special = b.icmp_unsigned(">=", magnitude, _like(ty, 0x0F800000))  # inf and NaN
    value = b.select(special, b.or_(magnitude, _like(ty, 0x7F800000)), scaled)
    sign = b.shl(b.and_(wide, _like(ty, 0x8000)), _like(ty, 16))
    return b.bitcast(b.or_(value, sign), scale.type)


def f32_to_half_by_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounding to halves (nearest even) with integers; subnormals through one float addition."""
    bits = b.bitcast(value, _shape(value.type, _I32))
    ty = bits.type
    sign = b.and_(bits, _like(ty, 0x80000000))
    mag = b.xor(bits, sign)
    nan = b.icmp_unsigned(">", mag, _like(ty, 0x7F800000))
    overflow = b.select(nan, _like(ty, 0x7E00), _like(ty, 0x7C00))
    magic = b.bitcast(_like(ty, 0x3F000000), _shape(ty, _F32))  # 0.5 aligns a subnormal's last bit
    small = b.sub(b.bitcast(b.fadd(b.bitcast(mag, magic.type), magic), ty), _like(ty, 0x3F000000))
    odd = b.and_(b.lshr(mag, _like(ty, 13)), _like(ty, 1))
    normal = b.lshr(
        b.add(b.add(mag, _like(ty, (15 - 127) * (1 << 23) + 0xFFF & 0xFFFFFFFF)), odd),
        _like(ty, 13),
    )
    half = b.select(b.icmp_unsigned("<", mag, _like(ty, 0x38800000)), small, normal)
    half = b.select(b.icmp_unsigned(">=", mag, _like(ty, 0x47800000)), overflow, half)
    return b.trunc(b.or_(half, b.lshr(sign, _like(ty, 16))), _shape(ty, _I16))


def separate_multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """a * b + c with two roundings, for CPUs without FMA."""
    return b.fadd(b.fmul(x, y), z)
