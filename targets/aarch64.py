"""AArch64 primitives, in LLVM's IR builder; the target files pick from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.lowering import intrinsic_call, splat
from headrace.targets.pieces import concat, cut

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_Q8, _Q16, _Q32 = ir.VectorType(_I8, 16), ir.VectorType(_I16, 8), ir.VectorType(_I32, 4)

Pair = tuple[ir.Value, ir.Value]


def _pause(b: ir.IRBuilder) -> None:
    intrinsic_call(b, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(_I32, 1)])


def _load_q8(b: ir.IRBuilder, p: ir.Value) -> list[ir.Value]:
    three = ir.LiteralStructType([_Q32] * 3)
    loaded = intrinsic_call(b, "llvm.aarch64.neon.ld1x3.v4i32.p0", three, [p])
    return [b.extract_value(loaded, i) for i in range(3)]


def _smull_words(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Products of int16 lanes as int32; of a lane in every lane it is one instruction."""
    out = [
        intrinsic_call(b, "llvm.aarch64.neon.smull.v4i32", _Q32, list(row))
        for row in zip(cut(b, x, 8), cut(b, y, 8), strict=True)
    ]
    return concat(b, out)


COMMON: Mapping[str, Callable[..., Any]] = {
    "spin_pause": _pause,
    "load_q8": _load_q8,
    "widening_product": _smull_words,
}


# --- dotprod: signed bytes, four at a time, into 32 bits ------------------------------------------


def _sdot(
    b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
) -> Pair:
    out = [
        intrinsic_call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", _Q32, list(row))
        for row in zip(*(cut(b, v, 16) for v in (wide, w, x)), strict=True)
    ]
    return concat(b, out), narrow


DOTPROD: Mapping[str, Callable[..., Any]] = {**COMMON, "dot4": _sdot}


# --- i8mm: two rows of 8 bytes by two tokens ------------------------------------------------------


def _smmla(b: ir.IRBuilder, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    return intrinsic_call(b, "llvm.aarch64.neon.smmla.v4i32.v16i8", _Q32, [sums, w, x])


def _load_pair_words(b: ir.IRBuilder, p: ir.Value) -> list[ir.Value]:
    twos = ir.VectorType(_I64, 2)
    three = ir.LiteralStructType([twos] * 3)
    loaded = intrinsic_call(b, "llvm.aarch64.neon.ld3r.v2i64.p0", three, [p])
    # A fourth register would be loaded in vain for formats without a minimum.
    at = b.bitcast(b.gep(p, [ir.Constant(_I64, 24)]), _I64.as_pointer())
    last = splat(b, b.load(at, align=4), 2)
    return [b.bitcast(v, _Q32) for v in [*(b.extract_value(loaded, i) for i in range(3)), last]]


def _load_pair_codes(b: ir.IRBuilder, p: ir.Value) -> list[ir.Value]:
    four = ir.LiteralStructType([_Q8] * 4)
    loaded = intrinsic_call(b, "llvm.aarch64.neon.ld1x4.v16i8.p0", four, [p])
    return [b.extract_value(loaded, i) for i in range(4)]


I8MM: Mapping[str, Callable[..., Any]] = {
    **DOTPROD,
    "load_pair_words": _load_pair_words,
    "load_pair_codes": _load_pair_codes,
    "pair_products": _smmla,
}


# --- without dotprod: byte products to 16 bits, pairs to 32 ---------------------------------------


def _products(b: ir.IRBuilder, w: ir.Value, x: ir.Value) -> list[ir.Value]:
    return [
        intrinsic_call(b, "llvm.aarch64.neon.smull.v8i16", _Q16, list(row))
        for row in zip(cut(b, w, 8), cut(b, x, 8), strict=True)
    ]


def _sum_pairs(b: ir.IRBuilder, words: list[ir.Value]) -> ir.Value:
    """Sums of 4 words each of two registers, as int32."""
    both = intrinsic_call(b, "llvm.aarch64.neon.addp.v8i16", _Q16, words)
    return intrinsic_call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", _Q32, [both])


def _smull(
    b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
) -> Pair:
    # |w * x| <= 128 * 127: the sum of two products fits in 16 bits.
    sums = [
        _sum_pairs(b, _products(b, *row)) for row in zip(cut(b, w, 16), cut(b, x, 16), strict=True)
    ]
    return b.add(wide, concat(b, sums)), narrow


NEON: Mapping[str, Callable[..., Any]] = {**COMMON, "dot4": _smull}
