"""AArch64 primitives, in LLVM's IR builder; the target files pick from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.lowering import intrinsic_call, lanes, nibbles, splat
from headrace.targets.pieces import concat, cut
from headrace.targets.simd import SMALL

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_Q8, _Q16, _Q32 = ir.VectorType(_I8, 16), ir.VectorType(_I16, 8), ir.VectorType(_I32, 4)

Pair = tuple[ir.Value, ir.Value]


def _pause(b: ir.IRBuilder) -> None:
    intrinsic_call(b, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(_I32, 1)])


def _load_q8(b: ir.IRBuilder, p: ir.Value) -> list[ir.Value]:
    three = ir.LiteralStructType([_Q32] * 3)
    loaded = intrinsic_call(b, "llvm.aarch64.neon.ld1x3.v4i32.p0", three, [p])
    return [b.extract_value(loaded, i) for i in range(3)]


def _shifted(b: ir.IRBuilder, word: ir.Value, bits: int) -> ir.Value:
    """A word of 16 bits in every lane, shifted: one widening product by a lane of a register."""
    half = ir.VectorType(_I16, 4)
    rows = [splat(b, b.trunc(word, _I16), 4), ir.Constant(half, [1 << bits] * 4)]
    four = intrinsic_call(b, "llvm.aarch64.neon.smull.v4i32", _Q32, rows)
    return concat(b, [four] * (lanes() // 4))


def _lookup16(b: ir.IRBuilder, table: ir.Constant, v: ir.Value, shift: int) -> ir.Value:
    rows = cut(b, nibbles(b, v, shift), 16)
    name = "llvm.aarch64.neon.tbl1.v16i8"
    return concat(b, [intrinsic_call(b, name, _Q8, [table, one]) for one in rows])


COMMON: Mapping[str, Callable[..., Any]] = {"spin_pause": _pause, "load_q8": _load_q8}
REGISTERS: Mapping[str, Callable[..., Any]] = {
    **COMMON,
    "shifted_word": _shifted,
    "lookup16": _lookup16,
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


DOTPROD: Mapping[str, Callable[..., Any]] = {**REGISTERS, "dot4": _sdot, "dot4_each": _sdot}


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


def _narrow(n_lanes: int) -> ir.Type:
    return ir.VectorType(_I16, 4 * n_lanes)


def _products(b: ir.IRBuilder, w: ir.Value, x: ir.Value) -> list[ir.Value]:
    return [
        intrinsic_call(b, "llvm.aarch64.neon.smull.v8i16", _Q16, list(row))
        for row in zip(cut(b, w, 8), cut(b, x, 8), strict=True)
    ]


def _add_to_words(b: ir.IRBuilder, words: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """One sum of products for each byte (`smlal`)."""
    sums = zip(cut(b, words, 16), _products(b, w, x), strict=True)
    return concat(b, [b.add(*row) for row in sums])


def _add_pairs(b: ir.IRBuilder, wide: ir.Value, words: ir.Value) -> ir.Value:
    """wide + the sums of two neighbouring words each (`sadalp`)."""
    name = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
    pairs = zip(cut(b, wide, 16), cut(b, words, 16), strict=True)
    return concat(b, [b.add(t, intrinsic_call(b, name, _Q32, [eight])) for t, eight in pairs])


def _fold(b: ir.IRBuilder, value: ir.Value, name: str, ty: ir.Type) -> ir.Value:
    """Sums of two neighbours."""
    parts = cut(b, value, 16)
    pairs = zip(parts[0::2], parts[1::2], strict=True)
    return concat(b, [intrinsic_call(b, name, ty, list(two)) for two in pairs])


def _doubled(ty: ir.Type) -> ir.Type:
    return ir.VectorType(_I32, ty.count // 2)


def _smlal(
    b: ir.IRBuilder,
    wide: ir.Value,
    narrow: ir.Value,
    weights: list[ir.Value],
    xs: list[ir.Value],
    bits: int,
) -> Pair:
    if bits < 8:  # 8 x 31 x 127 and 4 x 63 x 127 fit in 16 bits
        for row in zip(weights, xs, strict=True):
            narrow = _add_to_words(b, narrow, *row)
        return wide, narrow
    # So do two products of |w| <= 128 and |x| <= 127: sums of four are summed in 32 bits.
    words = ir.Constant(narrow.type, None)
    for row in zip(weights, xs, strict=True):
        words = _add_to_words(b, words, *row)
    sums = _add_pairs(b, b.bitcast(narrow, _doubled(narrow.type)), words)
    return wide, b.bitcast(sums, narrow.type)


def _dot_result(b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, bits: int) -> ir.Value:
    if bits in (4, SMALL):  # 2 x 8 x 15 x 127 still fits
        return _add_pairs(b, wide, _fold(b, narrow, "llvm.aarch64.neon.addp.v8i16", _Q16))
    doubled = _doubled(narrow.type)
    if bits == 8:
        sums = b.bitcast(narrow, doubled)
    else:
        sums = _add_pairs(b, ir.Constant(doubled, None), narrow)
    return b.add(wide, _fold(b, sums, "llvm.aarch64.neon.addp.v4i32", _Q32))


def _load_q8_words(b: ir.IRBuilder, p: ir.Value) -> list[ir.Value]:
    four = ir.LiteralStructType([_Q32] * 4)
    loaded = intrinsic_call(b, "llvm.aarch64.neon.ld4r.v4i32.p0", four, [p])
    return [b.extract_value(loaded, i) for i in range(4)]


NEON: Mapping[str, Callable[..., Any]] = {
    **REGISTERS,
    "load_q8_words": _load_q8_words,
    "dot_narrow": _narrow,
    "dot8": _smlal,
    "dot_result": _dot_result,
}
