"""AArch64 primitives of SVE on vectors of a fixed length, in LLVM's IR builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.aarch64 import COMMON
from headrace.targets.lowering import intrinsic_call, nibbles
from headrace.targets.pieces import concat, cut
from headrace.targets.scalable import Scalable, to_fixed, to_scalable

_I8, _I32, _I64 = (ir.IntType(n) for n in (8, 32, 64))

Pair = tuple[ir.Value, ir.Value]


_CODES, _SUMS = Scalable(_I8, 16), Scalable(_I32, 4)
_OPERANDS = _SUMS, _CODES, _CODES


def _sdot_lane(bits: int) -> Callable[..., Pair]:
    def dot4(
        b: ir.IRBuilder,
        wide: ir.Value,
        narrow: ir.Value,
        w: ir.Value,
        x: tuple[ir.Value, int],
        _: int,
    ) -> Pair:
        fixed = ir.VectorType(_I32, bits // 32)
        quarter = to_scalable(b, b.bitcast(x[0], ir.VectorType(_I8, 16)), _CODES)
        # Lanes are counted within 128 bits: all of these get the same codes.
        name = f"llvm.aarch64.sve.dupq.lane.{_CODES.name}"
        quarters = intrinsic_call(b, name, _CODES, [quarter, ir.Constant(_I64, 0)])
        out = []
        for total, row in zip(cut(b, wide, bits // 8), cut(b, w, bits // 8), strict=True):
            both = to_scalable(b, total, _SUMS), to_scalable(b, row, _CODES)
            operands = [*both, quarters, ir.Constant(_I32, x[1])]
            name = f"llvm.aarch64.sve.sdot.lane.{_SUMS.name}"
            out.append(to_fixed(b, intrinsic_call(b, name, _SUMS, operands), fixed))
        return concat(b, out), narrow

    return dot4


def _sdot(bits: int) -> Callable[..., Pair]:
    def dot4(
        b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, _: int
    ) -> Pair:
        fixed, out = ir.VectorType(_I32, bits // 32), []
        for row in zip(*(cut(b, v, bits // 8) for v in (wide, w, x)), strict=True):
            operands = [to_scalable(b, v, t) for v, t in zip(row, _OPERANDS, strict=True)]
            found = intrinsic_call(b, f"llvm.aarch64.sve.sdot.{_SUMS.name}", _SUMS, operands)
            out.append(to_fixed(b, found, fixed))
        return concat(b, out), narrow

    return dot4


def _lookup16(bits: int) -> Callable[..., ir.Value]:
    def lookup16(b: ir.IRBuilder, table: ir.Constant, v: ir.Value, shift: int) -> ir.Value:
        low = to_scalable(b, table, _CODES)  # no code is beyond the first 16 bytes
        rows = cut(b, nibbles(b, v, shift), min(bits // 8, v.type.count))
        name = f"llvm.aarch64.sve.tbl.{_CODES.name}"
        found = [intrinsic_call(b, name, _CODES, [low, to_scalable(b, r, _CODES)]) for r in rows]
        return concat(b, [to_fixed(b, one, rows[0].type) for one in found])

    return lookup16


def sve(bits: int) -> Mapping[str, Callable[..., Any]]:
    """Primitives for vectors of so many bits."""
    return {
        **COMMON,
        "dot4": _sdot(bits),
        "dot4_each": _sdot(bits),
        "dot4_lane": _sdot_lane(bits),
        "lookup16": _lookup16(bits),
    }
