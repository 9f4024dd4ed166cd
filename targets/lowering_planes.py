"""What markers of bit planes mean: see `headrace.targets.lowering`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils

from headrace.targets.lowering import (
    LANES,
    VecType,
    first_of,
    join,
    lanes,
    literal,
    marker,
    nibbles,
    primitive,
    vector_type,
)
from headrace.targets.pieces import concat, cut

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_CHUNKS, _COLUMNS, _TABLE = 2, 4, 16  # of 32 inputs; of 16 bytes, one of each row; bytes
_BIAS = 128  # of a table's bytes
Products = Sequence[tuple[ir.Value, ir.Value]]  # tables and the codes that choose from them


def _bytes_at(b: ir.IRBuilder, p: ir.Value, offset: int, n: int) -> ir.Value:
    at = b.gep(p, [ir.Constant(_I64, offset)], inbounds=True)
    return b.load(b.bitcast(at, ir.VectorType(_I8, n).as_pointer()), align=1)


@marker("load_columns", lambda p, count, stride: VecType("u8", literal(count, "count")))
def _load_columns(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    n = lanes()
    first = first_of(b, args[0], sig.args[0], ir.VectorType(_I8, n))
    stride = args[2] if args[2].type == _I64 else b.sext(args[2], _I64)
    order = [row + n * column for row in range(n) for column in range(_COLUMNS)]
    mask = ir.Constant(ir.VectorType(_I32, len(order)), order)
    parts = []
    for i in range(sig.return_type.count):
        at = b.gep(first, [b.mul(stride, ir.Constant(_I64, i))], inbounds=True) if i else first
        whole = concat(b, [_bytes_at(b, at, LANES * column, n) for column in range(_COLUMNS)])
        parts.append(b.shuffle_vector(whole, ir.Constant(whole.type, ir.Undefined), mask))
    return join(parts)


def _from_memory(b: ir.IRBuilder, table: ir.Value, codes: ir.Value, shift: int) -> ir.Value:
    """For CPUs that look up no bytes in registers."""
    place = cgutils.alloca_once(b, ir.ArrayType(_I8, _TABLE))  # type: ignore[no-untyped-call]
    b.store(table, b.bitcast(place, table.type.as_pointer()), align=1)
    found = ir.Constant(codes.type, ir.Undefined)
    codes = nibbles(b, codes, shift)
    for i in range(codes.type.count):
        code = b.zext(b.extract_element(codes, ir.Constant(_I32, i)), _I32)
        one = b.load(b.gep(place, [ir.Constant(_I32, 0), code], inbounds=True))
        found = b.insert_element(found, one, ir.Constant(_I32, i))
    return found


def _looked_up_sums(b: ir.IRBuilder, planes: Sequence[Products]) -> ir.Value:
    """Numbers of the tables, summed by rows in 16 bits; plane p counts 2^p times."""
    look: Callable[..., ir.Value] = primitive("lookup16") or _from_memory
    words = ir.VectorType(_I16, LANES)
    total = None
    for p, products in enumerate(planes):
        plane = ir.Constant(words, None)
        for tables, codes in products:
            for table, some in zip(cut(b, tables, _TABLE), cut(b, codes, _TABLE), strict=True):
                plane = b.add(plane, b.zext(look(b, table, some, 0), words))
        plane = b.shl(plane, ir.Constant(words, [p] * LANES))
        total = plane if total is None else b.add(total, plane)
    return total


@marker("plane_sums", lambda codes, tables, bits: VecType("i32", 1))
def _plane_sums(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    bits, n = literal(sig.args[2], "bits"), _COLUMNS * _TABLE
    planes: list[list[tuple[ir.Value, ir.Value]]] = [[] for _ in range(bits)]
    for chunk in range(_CHUNKS):
        tables = [_bytes_at(b, args[1], (2 * chunk + half) * n, n) for half in (0, 1)]
        for p, products in enumerate(planes):
            codes = _bytes_at(b, args[0], (chunk * bits + p) * n, n)
            products += [(tables[half], nibbles(b, codes, 4 * half)) for half in (0, 1)]
    total = (primitive("looked_up_sums") or _looked_up_sums)(b, planes)
    # 7 x 16 x 255 fits in 16 bits.
    bias = _BIAS * 2 * _CHUNKS * _COLUMNS * ((1 << bits) - 1)
    less = b.sub(total, ir.Constant(total.type, [bias] * LANES))
    return b.sext(less, vector_type("i32"))
