"""WebAssembly primitives, in LLVM's IR builder; the target file picks from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.fallbacks import (
    f32_to_half_by_bits,
    half_to_f32_by_bits,
    separate_multiply_add,
)
from headrace.targets.lowering import intrinsic_call, nibbles
from headrace.targets.pieces import concat, cut
from headrace.targets.portable import every, widened

_I8, _I16, _I32 = (ir.IntType(n) for n in (8, 16, 32))
_V8, _V32 = ir.VectorType(_I8, 16), ir.VectorType(_I32, 4)

Pair = tuple[ir.Value, ir.Value]


def _narrow(lanes: int) -> ir.Type:
    return ir.VectorType(_I32, 2 * lanes)


def _dot4(
    b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
) -> Pair:
    """Sums of two products each: the only dot product of the baseline takes 16-bit integers."""
    eight = widened(b, cut(b, x, 8)[0], 16)  # the same 4 codes over and over
    sums = [
        b.add(four, intrinsic_call(b, "llvm.wasm.dot", _V32, [widened(b, codes, 16, bits), eight]))
        for four, codes in zip(cut(b, narrow, 16), cut(b, w, 8), strict=True)
    ]
    return wide, concat(b, sums)


def _dot4_lanes(
    b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
) -> Pair:
    """The same for codes that are those over and over."""
    return _dot4(b, wide, narrow, x, w, 8)


def _dot_result(b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, bits: int) -> ir.Value:
    return b.add(wide, b.add(every(b, narrow, 0, 2), every(b, narrow, 1, 2)))


def _lookup16(b: ir.IRBuilder, table: ir.Constant, v: ir.Value, shift: int) -> ir.Value:
    rows = cut(b, nibbles(b, v, shift), 16)
    return concat(b, [intrinsic_call(b, "llvm.wasm.swizzle", _V8, [table, one]) for one in rows])


SIMD128: Mapping[str, Callable[..., Any]] = {
    "half_to_f32": half_to_f32_by_bits,
    "f32_to_half": f32_to_half_by_bits,
    "fma": separate_multiply_add,
    "dot_narrow": _narrow,
    "dot4": _dot4,
    "dot4_lanes": _dot4_lanes,
    "dot_result": _dot_result,
    "lookup16": _lookup16,
}
