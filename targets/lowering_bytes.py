"""What the markers of images of bytes mean: see `headrace.targets.lowering`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
from numba.core import types

from headrace.targets.lowering import (
    VecType,
    as_i64,
    constant,
    current_target,
    intrinsic_call,
    join,
    lanes,
    literal,
    marker,
    primitive,
    shuffle,
    split,
    zipped,
)
from headrace.targets.pieces import concat, cut
from headrace.targets.portable import dot4

_I8, _I16, _I64 = (ir.IntType(n) for n in (8, 16, 64))
_PIECE = 16  # bytes that are interleaved with one another


def _place(b: ir.IRBuilder, p: ir.Value, stride: ir.Value, count: int) -> ir.Value:
    return b.gep(p, [b.mul(stride, ir.Constant(_I64, count))], inbounds=True) if count else p


def _store(b: ir.IRBuilder, p: ir.Value, value: ir.Value) -> None:
    b.store(value, b.bitcast(p, value.type.as_pointer()), align=1)


@marker("store_u8_rows", lambda p, value, per, rows, stride: types.none)
def _store_u8_rows(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    per, rows = (literal(t, "argument") for t in sig.args[2:4])
    stride, size = as_i64(b, args[4]), _PIECE // per
    for i, one in enumerate(split(args[1])):
        for k in range(min(per, rows - i * per)):
            order = [j + size * k + n for j in range(0, 64, _PIECE) for n in range(size)]
            row = one if per == 1 else shuffle(b, one, one, order)
            _store(b, _place(b, args[0], stride, i * per + k), row)


@marker("store_u8_quarter", lambda p, value, index: types.none)
def _store_u8_quarter(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    begin = _PIECE * literal(sig.args[2], "index")
    _store(b, args[0], shuffle(b, args[1], args[1], range(begin, begin + _PIECE)))


@marker("dot4_each", lambda acc, x, w: acc)
def _dot4_each(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    step, prepare = primitive("dot4_each"), primitive("dot4_weights")
    found = []
    parts = (split(v) for v in args)
    for acc, x, w in zip(*parts, strict=True):
        if step is None:
            found.append(dot4(b, acc, acc, x, w, 8)[0])
        else:
            codes = prepare(b, x, 8) if prepare else x
            found.append(step(b, acc, acc, codes, w, 8)[0])
    return join(found)


@marker("interleave4", lambda v: v if v.count == 4 else None)
def _interleave4(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    four = split(args[0])
    if not current_target().shuffle_bytes:
        return join(_interleaved(b, four))
    pieces = [
        _interleaved(b, list(row)) for row in zip(*(cut(b, v, _PIECE) for v in four), strict=True)
    ]
    return join([concat(b, list(column)) for column in zip(*pieces, strict=True)])


def _interleaved(b: ir.IRBuilder, four: list[ir.Value]) -> list[ir.Value]:
    """Bytes of four vectors in turn, within each piece of 16 bytes."""

    def words(value: ir.Value) -> ir.Value:
        return b.bitcast(value, ir.VectorType(_I16, value.type.count // 2))

    found = []
    for half in (0, 1):
        x = words(zipped(b, four[0], four[1], half, _PIECE))
        y = words(zipped(b, four[2], four[3], half, _PIECE))
        found += [zipped(b, x, y, part, _PIECE // 2) for part in (0, 1)]
    return [b.bitcast(one, four[0].type) for one in found]


@marker("to_bytes", lambda v, *rest: VecType("u8", v.count // 4) if v.count % 4 == 0 else None)
def _to_bytes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    parts = split(args[0])
    own = primitive("to_bytes") or _rounded
    fours = [parts[i : i + 4] for i in range(0, len(parts), 4)]
    return join([own(b, four, *args[1:]) for four in fours])


def _narrowed(b: ir.IRBuilder, four: Sequence[ir.Value]) -> ir.Value:
    """The low bytes of four vectors of four."""
    # In registers of 128 bits: of more, LLVM 20 makes no code for SVE.
    words = [b.trunc(one, ir.VectorType(_I16, 4)) for one in four]
    eights = [concat(b, words[i : i + 2]) for i in (0, 2)]
    return concat(b, [b.trunc(one, ir.VectorType(_I8, 8)) for one in eights])


def _rounded(
    b: ir.IRBuilder, four: list[ir.Value], zero: ir.Value, least: ir.Value, most: ir.Value
) -> ir.Value:
    """In the low bits of a sum: see `simd.round_i32`."""
    low, high = (b.sitofp(b.sub(end, zero), four[0].type) for end in (least, most))
    magic = ir.Constant(low.type, [12582912.0] * lanes())
    offset = b.sub(zero, constant("i32", 0x4B400000))
    codes = []
    for one in four:
        one = b.select(b.fcmp_ordered("<", one, high), one, high)
        one = b.select(b.fcmp_ordered("<", one, low), low, one)
        codes.append(b.add(b.bitcast(b.fadd(one, magic), zero.type), offset))
    if current_target().shuffle_bytes:
        return concat(
            b,
            [
                _narrowed(b, row)
                for row in zip(*(cut(b, one, _PIECE) for one in codes), strict=True)
            ],
        )
    codes = [b.trunc(one, ir.VectorType(_I8, lanes())) for one in codes]
    first, second = (shuffle(b, x, y, range(2 * lanes())) for x, y in (codes[:2], codes[2:]))
    quads = range(lanes() // 4)
    order = [lanes() * v + 4 * j + i for j in quads for v in range(4) for i in range(4)]
    return shuffle(b, first, second, order)


def saturated_sum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Of signed integers, lane by lane."""
    name = f"llvm.sadd.sat.v{x.type.count}i{x.type.element.width}"
    return intrinsic_call(b, name, x.type, [x, y])
