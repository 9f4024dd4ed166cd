"""Constant vectors of LLVM, each made once: as text they are long."""

from __future__ import annotations

import functools

import llvmlite.ir as ir

_I32 = ir.IntType(32)


@functools.cache
def chosen(lanes: tuple[int, ...]) -> ir.Constant:
    """Which lanes a shuffle takes."""
    return ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))


@functools.cache
def repeated(element: ir.IntType, count: int, value: int) -> ir.Constant:
    """An integer in every lane."""
    return ir.Constant(ir.VectorType(element, count), [value] * count)


@functools.cache
def _undefined(element: ir.Type, count: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, count), ir.Undefined)


def undefined(ty: ir.VectorType) -> ir.Constant:
    """A vector of which nobody looks at the values."""
    return _undefined(ty.element, ty.count)
