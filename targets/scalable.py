"""Vectors of a fixed length in LLVM's scalable types, which some intrinsics take alone."""

from __future__ import annotations

import llvmlite.ir as ir

from headrace.targets.lowering import intrinsic_call

_I64 = ir.IntType(64)


class Scalable(ir.Type):
    """`count` elements times the CPU's `vscale`, which llvmlite's builder does not know."""

    def __init__(self, element: ir.IntType, count: int) -> None:
        self._text = f"<vscale x {count} x {element}>"
        self.name = f"nxv{count}i{element.width}"

    def _to_string(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scalable) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def _name(ty: ir.VectorType) -> str:
    return f"v{ty.count}i{ty.element.width}"


def to_scalable(b: ir.IRBuilder, value: ir.Value, ty: Scalable) -> ir.Value:
    """A vector that is no longer than a register, as one of a scalable type."""
    name = f"llvm.vector.insert.{ty.name}.{_name(value.type)}"
    undef = ir.Constant(ty, ir.Undefined)
    return intrinsic_call(b, name, ty, [undef, value, ir.Constant(_I64, 0)])


def to_fixed(b: ir.IRBuilder, value: ir.Value, ty: ir.VectorType) -> ir.Value:
    """The first elements of a vector of a scalable type."""
    name = f"llvm.vector.extract.{_name(ty)}.{value.type.name}"
    return intrinsic_call(b, name, ty, [value, ir.Constant(_I64, 0)])
