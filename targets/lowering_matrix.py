"""What markers of matrix registers mean: see `headrace.targets.lowering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba.core import types

from headrace.targets.lowering import (
    PTR,
    as_i64,
    current_target,
    literal,
    marker,
    primitive,
    stack_place,
)

_I8, _I32 = ir.IntType(8), ir.IntType(32)
_LINE = 64


def _own(name: str) -> Callable[..., None]:
    found = primitive(name)
    if found is None:
        raise TypeError(f"target {current_target().name} has no {name}")
    return found


@marker("stack_bytes", lambda n: PTR)
def _stack_bytes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    place = stack_place(b, ir.ArrayType(_I8, literal(sig.args[0], "n_bytes")))
    place.align = _LINE
    return b.bitcast(place, _I8.as_pointer())


@marker("matrix_begin", lambda n: types.none)
def _begin(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _own("matrix_begin")(b, as_i64(b, args[0]))


@marker("matrix_end", lambda: types.none)
def _end(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _own("matrix_end")(b)


@marker("matrix_zero", lambda register: types.none)
def _zero(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _own("matrix_zero")(b, literal(sig.args[0], "register"))


@marker("matrix_load", lambda register, p, stride: types.none)
def _load(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _own("matrix_load")(b, literal(sig.args[0], "register"), args[1], as_i64(b, args[2]))


@marker("matrix_store", lambda p, register, stride: types.none)
def _store(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _own("matrix_store")(b, literal(sig.args[1], "register"), args[0], as_i64(b, args[2]))


@marker("matrix_dot", lambda sums, unsigned, signed: types.none)
def _dot(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _own("matrix_dot")(b, *(literal(one, "register") for one in sig.args))
