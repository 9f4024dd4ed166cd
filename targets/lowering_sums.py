"""What markers of sums in single registers mean: see `headrace.targets.lowering`."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core import types

from headrace.targets.lowering import INT32, intrinsic_call, marker, primitive

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
