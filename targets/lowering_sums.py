"""What markers of sums in single registers mean: see `headrace.targets.lowering`."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core import types

from headrace.targets.lowering import (
    INT32,
    VecType,
    intrinsic_call,
    lanes,
    marker,
    primitive,
    shuffle,
    splat,
)

_I8, _I32 = ir.IntType(8), ir.IntType(32)


@marker("put_i32", lambda p, value: types.none)
def _put_i32(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    p, value = args
    value = b.trunc(value, _I32) if value.type.width > 32 else value
    b.store(value, b.bitcast(p, _I32.as_pointer()), align=4)


@marker("dot_sum", lambda acc, x, y: INT32)
def _dot_sum(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("dot_sum")
    if own is not None:
        return own(b, *args)
    acc, *both = args
    n = both[0].type.count
    wide = ir.VectorType(_I32, n)
    x, y = (b.sext(v, wide) for v in both)
    total = intrinsic_call(b, f"llvm.vector.reduce.add.v{n}i32", _I32, [b.mul(x, y)])
    return b.add(acc, total)


def _short(b: ir.IRBuilder, value: ir.Value, up: int, down: int) -> ir.Value:
    """Some bits of an integer, with the sign of the highest."""
    return b.ashr(b.shl(value, ir.Constant(_I32, up)), ir.Constant(_I32, down))


def _pair(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    last = b.and_(low, ir.Constant(_I32, 0xFFFF))
    return b.or_(last, b.shl(high, ir.Constant(_I32, 16)))


@marker("even_bytes", lambda value: INT32)
def _even_bytes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("even_bytes")
    if own is not None:
        return own(b, *args)
    return _pair(b, _short(b, args[0], 24, 24), _short(b, args[0], 8, 24))


@marker("odd_bytes", lambda value: INT32)
def _odd_bytes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("odd_bytes")
    if own is not None:
        return own(b, *args)
    return _pair(b, _short(b, args[0], 16, 24), _short(b, args[0], 0, 24))


@marker("dot_pairs", lambda acc, x, y: INT32)
def _dot_pairs(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("dot_pairs")
    if own is not None:
        return own(b, *args)
    acc, x, y = args
    low = b.mul(_short(b, x, 16, 16), _short(b, y, 16, 16))
    return b.add(b.add(acc, low), b.mul(_short(b, x, 0, 16), _short(b, y, 0, 16)))


@marker("four_i32", lambda *values: VecType("i32", 1) if lanes() == 4 else None)
def _four_i32(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    found: ir.Value = ir.Constant(ir.VectorType(_I32, 4), ir.Undefined)
    for i, one in enumerate(args):
        found = b.insert_element(found, one, ir.Constant(_I32, i))
    return found


@marker("gather_bytes", lambda p, offsets: offsets)
def _gather_bytes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("gather_bytes")
    if own is not None:
        return own(b, *args)
    p, offsets = args
    found: ir.Value = ir.Constant(offsets.type, ir.Undefined)
    for i in range(offsets.type.count):
        lane = ir.Constant(_I32, i)
        at = b.zext(b.extract_element(offsets, lane), _I32)
        found = b.insert_element(found, b.load(b.gep(p, [at])), lane)
    return found


@marker("scatter_i8", lambda p, value, offsets: types.none)
def _scatter_i8(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    own = primitive("scatter_i8")
    if own is not None:
        own(b, *args)
        return
    p, value, offsets = args
    for i in range(value.type.count):
        lane = ir.Constant(_I32, i)
        at = b.gep(p, [b.extract_element(offsets, lane)])
        b.store(b.trunc(b.extract_element(value, lane), _I8), at)


@marker("store_in_turn", lambda p, a, b, more: types.none)
def _store_in_turn(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    own = primitive("store_in_turn")
    if own is not None:
        own(b, *args)
        return
    p, first, second, more = args
    n = first.type.count
    order = [lane for pair in zip(range(n), range(n, 2 * n), strict=True) for lane in pair]
    codes = []
    for one in (first, second):
        code = b.add(one, more)
        low, high = (ir.Constant(one.type, [end] * n) for end in (-128, 127))
        code = b.select(b.icmp_signed("<", code, high), code, high)
        codes.append(b.select(b.icmp_signed(">", code, low), code, low))
    found = b.trunc(shuffle(b, codes[0], codes[1], order), ir.VectorType(_I8, 2 * n))
    b.store(found, b.bitcast(p, found.type.as_pointer())).align = 1


@marker("add_products", lambda acc, p, x: acc if acc.count == 1 else None)
def _add_products(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    acc, p, x = args
    memory = ir.VectorType(_I8, acc.type.count)
    codes = b.load(b.bitcast(p, memory.as_pointer()))
    codes.align = 1
    own = primitive("add_products")
    if own is not None:
        return own(b, acc, codes, x)
    return b.add(acc, b.mul(b.sext(codes, acc.type), splat(b, x, acc.type.count)))
