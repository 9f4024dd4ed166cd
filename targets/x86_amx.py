"""AMX of x86: 8 registers of 16 rows of 64 bytes, and their products, in LLVM's IR builder.

Source: Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3. Linux
saves them for processes that asked for it (`host_amx`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.ir as ir

from headrace.targets.lowering import intrinsic_call, stack_place

_I8, _I16, _I64 = (ir.IntType(n) for n in (8, 16, 64))
_CONFIG, _PALETTE, _ROW_BYTES, _ROWS = 64, 1, 16, 48  # bytes; the only palette; where fields begin
_MOST = 16  # rows


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    intrinsic_call(b, f"llvm.x86.{name}", ir.VoidType(), args)


def _register(n: int) -> ir.Constant:
    return ir.Constant(_I8, n)


def _begin(b: ir.IRBuilder, n_bytes: ir.Value) -> None:
    place = stack_place(b, ir.ArrayType(_I8, _CONFIG))
    place.align = _CONFIG
    config = b.bitcast(place, _I8.as_pointer())

    def put(at: int, value: ir.Value) -> None:
        to = b.gep(config, [ir.Constant(_I64, at)], inbounds=True)
        b.store(value, b.bitcast(to, value.type.as_pointer()), align=1)

    for at in range(0, _CONFIG, 8):
        put(at, ir.Constant(_I64, 0))
    put(0, ir.Constant(_I8, _PALETTE))
    whole = ir.Constant(_I16, _CONFIG), ir.Constant(_I8, _MOST)
    left = b.trunc(n_bytes, _I16), whole[1]
    right = whole[0], b.trunc(b.lshr(n_bytes, ir.Constant(_I64, 2)), _I8)
    for i, (row_bytes, rows) in enumerate([whole] * 4 + [left] * 2 + [right] * 2):
        put(_ROW_BYTES + 2 * i, row_bytes)
        put(_ROWS + i, rows)
    _call(b, "ldtilecfg", config)


def _load(b: ir.IRBuilder, register: int, p: ir.Value, stride: ir.Value) -> None:
    _call(b, "tileloadd64", _register(register), p, stride)


def _store(b: ir.IRBuilder, register: int, p: ir.Value, stride: ir.Value) -> None:
    _call(b, "tilestored64", _register(register), p, stride)


AMX: Mapping[str, Callable[..., Any]] = {
    "matrix_begin": _begin,
    "matrix_end": lambda b: _call(b, "tilerelease"),
    "matrix_zero": lambda b, register: _call(b, "tilezero", _register(register)),
    "matrix_load": _load,
    "matrix_store": _store,
    "matrix_dot": lambda b, *registers: _call(b, "tdpbusd", *map(_register, registers)),
}
