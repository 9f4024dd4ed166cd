"""Cut LLVM vectors in registers and put them together again."""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir as ir

from headrace.targets.constants import chosen, undefined


def cut(b: ir.IRBuilder, value: ir.Value, n_bytes: int) -> list[ir.Value]:
    """A vector as vectors of `n_bytes` each."""
    ty = value.type
    bits = 32 if isinstance(ty.element, ir.FloatType) else ty.element.width
    n = n_bytes * 8 // bits
    undef = undefined(ty)
    return [
        b.shuffle_vector(value, undef, chosen(tuple(range(i, i + n))))
        for i in range(0, ty.count, n)
    ]


def concat(b: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    """Vectors laid end to end; their number is a power of two."""
    while len(parts) > 1:
        n = parts[0].type.count
        index = chosen(tuple(range(2 * n)))
        parts = [b.shuffle_vector(parts[i], parts[i + 1], index) for i in range(0, len(parts), 2)]
    return parts[0]
