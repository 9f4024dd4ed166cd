"""AArch64 primitives of SVE on vectors of a fixed length, in LLVM's IR builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.aarch64 import COMMON
from headrace.targets.lowering import intrinsic_call
from headrace.targets.pieces import concat, cut

_I8, _I32, _I64 = (ir.IntType(n) for n in (8, 32, 64))

Pair = tuple[ir.Value, ir.Value]


class _Scalable(ir.Type):
    """A vector of 128 bits times the CPU's `vscale`, which llvmlite's builder does not know."""

    def __init__(self, element: ir.IntType) -> None:
        self._text = f"<vscale x {128 // element.width} x {element}>"
        self.name = f"nxv{128 // element.width}i{element.width}"

    def _to_string(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scalable) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def _scalable(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A vector as long as a register, as one of a scalable type."""
    ty = _Scalable(value.type.element)
    name = f"llvm.vector.insert.{ty.name}.v{value.type.count}i{value.type.element.width}"
    undef = ir.Constant(ty, ir.Undefined)
    return intrinsic_call(b, name, ty, [undef, value, ir.Constant(_I64, 0)])


def _sdot_lane(bits: int) -> Callable[..., Pair]:
    def dot4(
        b: ir.IRBuilder,
        wide: ir.Value,
        narrow: ir.Value,
        w: ir.Value,
        x: tuple[ir.Value, int],
        _: int,
    ) -> Pair:
        fixed, ty, codes = ir.VectorType(_I32, bits // 32), _Scalable(_I32), _Scalable(_I8)
        quarter = _scalable(b, b.bitcast(x[0], ir.VectorType(_I8, 16)))
        # Lanes are counted within 128 bits: all of these get the same codes.
        name = f"llvm.aarch64.sve.dupq.lane.{codes.name}"
        quarters = intrinsic_call(b, name, codes, [quarter, ir.Constant(_I64, 0)])
        name = f"llvm.vector.extract.v{fixed.count}i32.{ty.name}"
        out = []
        for total, row in zip(cut(b, wide, bits // 8), cut(b, w, bits // 8), strict=True):
            operands = [_scalable(b, total), _scalable(b, row), quarters, ir.Constant(_I32, x[1])]
            total = intrinsic_call(b, f"llvm.aarch64.sve.sdot.lane.{ty.name}", ty, operands)
            out.append(intrinsic_call(b, name, fixed, [total, ir.Constant(_I64, 0)]))
        return concat(b, out), narrow

    return dot4


def sve(bits: int) -> Mapping[str, Callable[..., Any]]:
    """Primitives for vectors of so many bits."""
    return {**COMMON, "dot4_lane": _sdot_lane(bits)}
