"""What markers of 16-bit integers, two in a lane, mean: see `headrace.targets.lowering`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir

from headrace.targets.lowering import (
    LANES,
    VecType,
    as_i64,
    constant,
    join,
    literal,
    marker,
    primitive,
    shuffle,
    split,
    vector_type,
)

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


@marker("load_halves", lambda p, q, n, stride: VecType("i32", literal(n, "count")))
def _load_halves(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    half, stride = ir.VectorType(_I32, LANES // 2), as_i64(b, args[3])

    def one(i: int) -> ir.Value:
        ahead = b.mul(stride, ir.Constant(_I64, i))
        at = (b.gep(p, [ahead], inbounds=True) for p in args[:2])
        low, high = (b.load(b.bitcast(p, half.as_pointer()), align=4) for p in at)
        return shuffle(b, low, high, range(LANES))

    return join([one(i) for i in range(sig.return_type.count)])


def _words(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.bitcast(value, ir.VectorType(_I16, 2 * LANES))


def _group_words(
    b: ir.IRBuilder, value: ir.Value, index: int, scales: ir.Value, groups: Sequence[int]
) -> ir.Value:
    """For CPUs without such an instruction; LLVM unpacks the words of a unit once."""

    def every(n: int) -> ir.Constant:
        return ir.Constant(value.type, [n] * value.type.count)

    undef = ir.Constant(value.type, ir.Undefined)
    nibbles = b.and_(b.lshr(value, every(4 * index)), every(15))
    steps = shuffle(b, b.and_(scales, every(0xFF)), undef, groups)
    offsets = shuffle(b, b.and_(b.ashr(scales, every(4)), every(0xFFF0)), undef, groups)
    return b.add(b.mul(nibbles, steps), offsets)


@marker("group_words", lambda v, *rest: v)
def _lower_group_words(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    index, first, n = (literal(sig.args[i], "argument") for i in (1, 3, 4))
    value, scales = (_words(b, args[i]) for i in (0, 2))
    groups = [first + i * n // value.type.count for i in range(value.type.count)]
    found = (primitive("group_words") or _group_words)(b, value, index, scales, groups)
    return b.bitcast(found, vector_type("i32"))


def _dot_words_by_lanes(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """For CPUs without such an instruction: both halves of each lane, widened where they lie."""
    sixteen = constant("i32", 16)
    low = b.mul(*(b.ashr(b.shl(v, sixteen), sixteen) for v in (x, y)))
    high = b.mul(*(b.ashr(v, sixteen) for v in (x, y)))
    return b.add(b.add(acc, low), high)


@marker("dot_words", lambda acc, x, y: acc)
def _dot_words(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    dot = primitive("dot_words") or _dot_words_by_lanes
    rows = zip(*(split(v) for v in args), strict=True)
    return join([dot(b, *row) for row in rows])
